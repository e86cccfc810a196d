"""A sweep that trains networks of one shape at once is the sweep that trains them one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from invdyn.training.checkpoint import list_checkpoints
from invdyn.training.trials import Trial, best_first, group_trials, run_trials_at_once
from invdyn.training.tuning import SweepRow, collect_rows, run_sweep
from invdyn.training.worker import Metrics
from invdyn.transitions.store import TransitionStore
from tests.training.runs import run_config
from tests.training.test_tuning import DIVERGING, GOOD, RATE, make_sweep, make_trials

pytestmark = pytest.mark.usefixtures("without_shape_checks")

REGRESSION = {"_target_": "invdyn.models.MLPRegression", "name": "mlp", "down_dims": [8]}
SPACE = {"down_dims": [[8], [8, 8]], RATE: [GOOD, GOOD / 3, DIVERGING], "num_inference_steps": [1, 2]}


def assert_same_sweep(found: list[SweepRow], expected: list[SweepRow]) -> None:
    def key(row: SweepRow) -> str:
        return f"{row.trial} {row.num_inference_steps}"

    for ours, theirs in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        assert (ours.trial, ours.status, ours.settings, ours.epochs, ours.parameters) == (
            theirs.trial,
            theirs.status,
            theirs.settings,
            theirs.epochs,
            theirs.parameters,
        )
        for found_value, value in ((ours.val_nrmse, theirs.val_nrmse), (ours.energy_score, theirs.energy_score)):
            assert found_value == (None if value is None else pytest.approx(value, rel=1e-2))


def test_groups_are_of_one_shape_and_not_too_large(store: TransitionStore, tmp_path: Path) -> None:
    trials = make_trials(make_sweep(SPACE), store, tmp_path)
    assert group_trials(trials, 1) == [[trial] for trial in trials]
    assert group_trials(trials, 2) == [trials[:2], trials[2:3], trials[3:5], trials[5:]]
    assert group_trials(trials, 8) == [trials[:3], trials[3:]]


def test_a_local_sweep(store: TransitionStore, tmp_path: Path) -> None:
    """Each diverging network is a row of its own, and ends no other."""
    sweep = make_sweep(SPACE)
    expected = run_sweep(sweep, make_trials(sweep, store, tmp_path / "one by one"), tmp_path / "one by one", local=True)
    assert [row.status for row in expected].count("failed") == 2
    trials = make_trials(sweep, store, tmp_path / "at once")
    ended: list[None] = []
    at_once = sweep.replace(population=8)
    rows = run_sweep(at_once, trials, tmp_path / "at once", local=True, on_trial=lambda: ended.append(None))
    assert_same_sweep(rows, expected)
    assert len(ended) == len(trials)
    (Path(trials[0].run.run_dir) / "quality.json").unlink()
    assert_same_sweep(run_sweep(at_once, trials, tmp_path / "at once", local=True), expected)


def test_on_ray(store: TransitionStore, tmp_path: Path, ray_session: None) -> None:
    sweep = make_sweep(SPACE, population=2)
    rows = run_sweep(sweep, make_trials(sweep, store, tmp_path / "ray"), tmp_path / "ray", max_concurrent=2)
    local = run_sweep(sweep, make_trials(sweep, store, tmp_path / "local"), tmp_path / "local", local=True)
    assert_same_sweep(rows, local)


@pytest.mark.parametrize("healthy", [[GOOD / 100, GOOD], [GOOD]], ids=["two are left", "one is left"])
def test_the_best_network_is_reported_and_a_killed_population_goes_on(
    store: TransitionStore, tmp_path: Path, healthy: list[float]
) -> None:
    """One of it has diverged before the kill, and has no checkpoint."""
    sweep = make_sweep({RATE: [*healthy, DIVERGING]}, num_epochs=4)
    whole, killed = (make_trials(sweep, store, tmp_path / name) for name in ("whole", "killed"))
    expected: list[Metrics] = []
    run_trials_at_once(whole, (2,), expected.append)
    assert [row["epoch"] for row in expected] == [1, 2, 3, 4]
    assert expected[-1]["val_nrmse"] == min(quality(trial) for trial in whole[:-1])
    assert "must stay finite" in (Path(whole[-1].run.run_dir) / "error.txt").read_text()

    class Killed(BaseException):
        pass

    def kill(metrics: Metrics) -> None:
        if metrics["epoch"] == 3:
            raise Killed

    with pytest.raises(Killed):
        run_trials_at_once(killed, (2,), kill)
    assert "must stay finite" in (Path(killed[-1].run.run_dir) / "error.txt").read_text()
    seen: list[Metrics] = []
    run_trials_at_once(killed, (2,), seen.append)
    # One that is left is trained alone, which rounds otherwise.
    assert [row["val_nrmse"] for row in seen] == pytest.approx([row["val_nrmse"] for row in expected], rel=1e-3)
    log = (Path(killed[0].run.run_dir) / "train.log").read_text()
    assert f"continued on 1 worker(s) from step {2 * (store.num_rows('train') // 64)}" in log
    assert not list_checkpoints(killed[-1].run.run_dir)
    seen.clear()
    run_trials_at_once(killed, (2,), seen.append)
    assert [row["epoch"] for row in seen] == [1, 2, 3, 4]


def test_errors_that_are_no_numbers_come_last(store: TransitionStore, tmp_path: Path) -> None:
    """The only step of an epoch ends a network whose loss before it was finite."""
    errors = [math.nan, 0.2, None, 0.1, math.inf, math.nan, 0.3]
    assert sorted(errors, key=best_first)[:3] == [0.1, 0.2, 0.3]
    one_step = {"batch_size": store.num_rows("train"), "num_epochs": 1}
    trials = [
        Trial({RATE: rate}, run_config(store, tmp_path / str(rate), REGRESSION, learning_rate=rate, **one_step))
        for rate in (DIVERGING, GOOD)
    ]
    seen: list[Metrics] = []
    run_trials_at_once(trials, None, seen.append)
    rows = collect_rows(trials)
    assert [(row.status, row.settings[RATE]) for row in rows] == [("finished", GOOD), ("finished", DIVERGING)]
    assert rows[0].val_nrmse == pytest.approx(seen[-1]["val_nrmse"])
    assert math.isnan(rows[1].val_nrmse or 0.0)


def quality(trial: Trial) -> float:
    last = json.loads((Path(trial.run.run_dir) / "quality.json").read_text())["quality"][-1]
    checkpoint = sorted((Path(trial.run.run_dir) / "checkpoints").iterdir())[-1]
    assert last["num_inference_steps"] == 2
    return float(json.loads((checkpoint / "metrics.json").read_text())["val_nrmse"])
