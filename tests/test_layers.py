"""The layers of the package hold, and the check that holds them fires."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")


LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS, "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
    )


def test_layers_hold(repository):
    result = lint_imports(repository)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("models/probe.py", "import invdyn.transitions"),
        ("transitions/probe.py", "import invdyn.models"),
        ("sequences/probe.py", "import invdyn.transitions"),
        ("evaluation/probe.py", "import invdyn.training"),
        ("statistics_probe.py", "import numpy"),  # a new module must be given its layer
        ("models/probe.py", "import ray"),
        ("transitions/probe.py", "import ray.data"),
        ("training/probe.py", "import ray"),
        ("training/probe.py", "import wandb"),
        ("evaluation/probe.py", "import wandb"),
        ("evaluation/probe.py", "from invdyn.transitions import extract"),  # ray at second hand
    ],
)
def test_a_broken_rule_is_reported(module, statement, repository, tmp_path):
    shutil.copy(repository / "setup.cfg", tmp_path)
    shutil.copytree(repository / "invdyn", tmp_path / "invdyn", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "invdyn" / module).write_text(f"{statement}\n")

    result = lint_imports(tmp_path)

    assert result.returncode == 1, result.stdout + result.stderr
    assert "probe" in result.stdout
