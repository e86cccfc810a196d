"""The problems that models are proven on: what the configs promise, made small."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from invdyn.config import load_config
from invdyn.envs.posterior import ActionPosterior
from invdyn.errors import DataError
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.store import TransitionStore
from tests.benchmarks.conftest import Load


@pytest.fixture
def run(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["problems.py", "--folder", str(tmp_path), *arguments])
        load("problems").main()

    return run


def test_every_problem_is_made_and_then_kept(run: Any, load: Load, tmp_path: Path) -> None:
    run("--episodes", "10")
    names = list(load("problems").PROBLEMS)
    hashes = {name: TransitionStore(tmp_path / "inverse_dynamics" / name).content_hash for name in names}
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    run("--episodes", "10")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    again = tmp_path / "again"
    run("--episodes", "10", "--folder", str(again), names[-1])
    assert TransitionStore(again / "inverse_dynamics" / names[-1]).content_hash == hashes[names[-1]]


def test_a_recording_of_another_config_is_refused(run: Any) -> None:
    run("--episodes", "20", "pendulum_limits")
    with pytest.raises(DataError, match="pendulum_limits holds a recording of another config; give another folder"):
        run("--episodes", "21", "pendulum_limits")


def test_unknown_names_are_refused(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("walker")
    assert "NAME must be of pendulum_integrable, " in capsys.readouterr().err


def test_every_recordable_config_is_a_problem_but_the_shifted_pendulum(load: Load, repository: Path) -> None:
    configs = {path.stem: load_config(DatasetConfig, path) for path in repository.glob("configs/dataset/*.yaml")}
    recordable = {name for name, config in configs.items() if config.collect is not None}
    assert recordable - {"pendulum_integrable_dynamics_shift"} == set(load("problems").PROBLEMS)
    assert all(name == config.name for name, config in configs.items())


@pytest.mark.parametrize("name", ["pendulum_two_factor", "pendulum_antagonist", "pendulum_dead_zone"])
def test_the_posterior_is_of_the_recorded_policy(name: str, repository: Path) -> None:
    """Independent uniform actions over the whole range, inside the joint limits: what the closed forms assume."""
    collect = load_config(DatasetConfig, repository / "configs" / "dataset" / f"{name}.yaml").collect
    assert collect is not None
    assert (collect.policy.name, collect.policy.low, collect.policy.high) == ("uniform", None, None)
    assert collect.state_limits is not None
    ActionPosterior(*collect.task)
