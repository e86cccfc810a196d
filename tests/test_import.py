"""`import invdyn` is cheap: what is heavy is loaded when it is first used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("h5py", "matplotlib", "mujoco", "ray", "torch", "wandb")


def loaded_after(statement: str, repository: Path) -> set[str]:
    """Which of the heavy packages a fresh process has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint('loaded', *(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    return set(result.stdout.split("loaded", 1)[1].split())


def test_import_loads_nothing_heavy(repository):
    assert loaded_after("import invdyn", repository) == set()


@pytest.mark.parametrize("module", ["invdyn.config", "invdyn.errors", "invdyn.statistics"])
def test_leaf_modules_load_nothing_heavy(module, repository):
    assert loaded_after(f"import {module}", repository) == set()


def test_the_check_sees_a_heavy_import(repository):
    assert loaded_after("import invdyn, h5py", repository) == {"h5py"}


def test_models_load_neither_ray_nor_wandb(repository):
    assert loaded_after("from invdyn import FlowInverseDynamics", repository) & {"ray", "wandb", "matplotlib"} == set()


@pytest.mark.parametrize("name", ["FlowInverseDynamics", "InvdynError", "load_model"])
def test_public_names_resolve(name):
    import invdyn

    assert callable(getattr(invdyn, name))
    assert name in invdyn.__all__


def test_unknown_name_is_an_attribute_error():
    import invdyn

    with pytest.raises(AttributeError, match="no_such_name"):
        invdyn.no_such_name  # noqa: B018


def test_version_is_stated_once(repository):
    import invdyn

    assert "version = attr: invdyn.__version__" in (repository / "setup.cfg").read_text()
    assert invdyn.__version__[0].isdigit()
