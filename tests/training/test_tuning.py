from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invdyn.errors import ConfigError, DataError
from invdyn.models.registry import parse_model_config
from invdyn.training.checkpoint import SAMPLING_FILE, list_checkpoints, load_checkpoint, load_model
from invdyn.training.sweep_config import SweepConfig, model_of_trial, trial_name
from invdyn.training.trials import QUALITY_ROWS, Trial, run_trial
from invdyn.training.tuning import SweepRow, collect_rows, run_sweep, trial_resources
from invdyn.training.worker import Metrics
from invdyn.transitions.store import TransitionStore
from tests.training.runs import FLOW, LINEAR, RECIPE, TIMES, run_config

BASE = parse_model_config({**FLOW, "training": RECIPE}, where="test")
STEPS = [1, 2, 4]
GOOD, POOR, DIVERGING = 1e-2, 1e-9, 1e30
RATE = "training.learning_rate"
SPACE = {"down_dims": [[8], [16, 16]], RATE: [GOOD, DIVERGING], "num_inference_steps": STEPS}
COLUMNS = [
    *("trial", "status", "down_dims", RATE, "num_inference_steps", "val_nrmse", "energy_score", "us_per_action"),
    *("epochs", "train_s", "parameters", "run_dir"),
]
GROUP = "all-in-one"


def make_sweep(space: dict[str, Any] = SPACE, **values: Any) -> SweepConfig:
    names = {"name": "test", "dataset_config": "", "model_config": ""}
    return SweepConfig.model_validate({**names, "space": space, "asha": None, **values})


def make_trials(sweep: SweepConfig, store: TransitionStore, folder: Path, **values: Any) -> list[Trial]:
    trials = []
    for index, settings in enumerate(sweep.network_settings()):
        model = model_of_trial(BASE, settings)
        recipe = model.training.replace(num_epochs=sweep.num_epochs or 2)
        run_dir = folder / "trials" / trial_name(index, settings)
        run = run_config(store, run_dir, checkpoints=2, **values).replace(model=model, training=recipe)
        trials.append(Trial(settings, run))
    return trials


def read_results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows: list[SweepRow]) -> list[dict[str, Any]]:
    """Return what must not depend on how or how fast a sweep ran."""
    hidden = ("us_per_action", "train_s", "run_dir")
    return [{name: value for name, value in vars(row).items() if name not in hidden} for row in rows]


def forget_the_evaluation(trial: Trial, folder: Path) -> None:
    """Leave a trial as a kill between its last checkpoint and the end of its evaluation does."""
    (Path(trial.run.run_dir) / "quality.json").unlink()
    shutil.rmtree(folder / "tune", ignore_errors=True)


def checkpoint_times(trials: list[Trial]) -> dict[str, int]:
    files = [path for trial in trials for folder in list_checkpoints(trial.run.run_dir) for path in folder.iterdir()]
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def swept(store: TransitionStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[SweepRow]]:
    """A local sweep of four networks of which two diverge; no test may write into it."""
    folder = tmp_path_factory.mktemp("local")
    sweep = make_sweep()
    return folder, run_sweep(sweep, make_trials(sweep, store, folder), folder, local=True)


def test_rows_are_networks_times_step_counts(swept: tuple[Path, list[SweepRow]]) -> None:
    """A network that diverges is one row, noted as failed, and ends nothing."""
    folder, rows = swept
    finished, failed = rows[: 2 * len(STEPS)], rows[2 * len(STEPS) :]
    assert {row.status for row in finished} == {"finished"}
    assert sorted((tuple(row.settings["down_dims"]), row.num_inference_steps) for row in finished) == sorted(
        (widths, steps) for widths in ((8,), (16, 16)) for steps in STEPS
    )
    errors = [row.val_nrmse for row in finished]
    assert all(error is not None and 0 < error < 1 for error in errors)
    assert errors == sorted(errors)  # type: ignore[type-var]
    assert [(row.status, row.settings[RATE], row.val_nrmse, row.epochs) for row in failed] == [
        ("failed", DIVERGING, None, 0)
    ] * 2
    for row in failed:
        assert "training loss must stay finite" in (Path(row.run_dir) / "error.txt").read_text()
    assert len(list((folder / "trials").iterdir())) == 4


def test_every_network_is_trained_once(swept: tuple[Path, list[SweepRow]]) -> None:
    """Its step counts share weights, times and the number of parameters."""
    _, rows = swept
    for run_dir in {row.run_dir for row in rows if row.status == "finished"}:
        same = [row for row in rows if row.run_dir == run_dir]
        assert len({(row.train_s, row.parameters, row.epochs) for row in same}) == 1
        assert same[0].parameters == sum(p.numel() for p in load_model(run_dir).parameters())
        assert same[0].epochs == 2
        assert len(list_checkpoints(run_dir)) == 2


def test_results_csv(swept: tuple[Path, list[SweepRow]]) -> None:
    folder, rows = swept
    lines = read_results(folder)
    assert list(lines[0]) == COLUMNS
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert (line["trial"], line["status"]) == (row.trial, row.status)
        assert json.loads(line["down_dims"]) == row.settings["down_dims"]
        assert json.loads(line[RATE]) == row.settings[RATE]
        assert line["val_nrmse"] == ("" if row.val_nrmse is None else str(row.val_nrmse))


def test_best_is_the_best_row(swept: tuple[Path, list[SweepRow]], store: TransitionStore) -> None:
    folder, rows = swept
    best = load_checkpoint(folder / "best")
    assert best.config.model.to_values()["num_inference_steps"] == rows[0].num_inference_steps
    assert best.config.model.to_values()["down_dims"] == rows[0].settings["down_dims"]
    assert best.config.run_dir == rows[0].run_dir
    index = np.linspace(0, store.num_rows("val") - 1, min(store.num_rows("val"), QUALITY_ROWS)).astype(int)
    val = {name: torch.from_numpy(values[index]) for name, values in store.load("val").items()}
    drawn = best.model.sample(val["state"], val["next_state"], 8, generator=torch.Generator().manual_seed(0))[0]
    error = (drawn.double() - val["action"].double()).square().mean().sqrt() / store.moments.std[-1]
    assert float(error) == pytest.approx(rows[0].val_nrmse, rel=1e-5)


@pytest.mark.parametrize("space", [{"down_dims": [[4]]}, {"num_inference_steps": [3]}])
def test_best_samples_with_the_solver_that_was_chosen(
    space: dict[str, Any], store: TransitionStore, tmp_path: Path
) -> None:
    base = parse_model_config({**FLOW, "num_inference_steps": None, "training": RECIPE}, where="test")
    run = run_config(store, tmp_path / "trials/000").replace(model=base)
    (row,) = run_sweep(make_sweep(space), [Trial({}, run)], tmp_path, local=True)
    values = json.loads((list_checkpoints(run.run_dir)[-1] / SAMPLING_FILE).read_text())
    measured = values["chosen"]["solver"], row.num_inference_steps
    assert measured[0] != base.to_values()["solver"]
    best = load_model(tmp_path / "best")
    assert (best.solver, best.num_inference_steps) == measured


def test_the_steps_of_the_model_where_the_space_has_none(store: TransitionStore, tmp_path: Path) -> None:
    sweep = make_sweep({"down_dims": [[4]]}, num_epochs=1)
    (row,) = run_sweep(sweep, make_trials(sweep, store, tmp_path), tmp_path, local=True)
    assert row.num_inference_steps == FLOW["num_inference_steps"]


def test_a_model_without_steps(store: TransitionStore, tmp_path: Path) -> None:
    trial = Trial({"name": "linear"}, run_config(store, tmp_path / "trials/000", LINEAR, checkpoints=2))
    (row,) = run_sweep(make_sweep({"down_dims": [[8]]}), [trial], tmp_path, local=True)
    assert (row.status, row.num_inference_steps, row.parameters) == ("finished", 1, 0)
    load_model(tmp_path / "best")


def test_none_finished(store: TransitionStore, tmp_path: Path) -> None:
    sweep = make_sweep({"down_dims": [[8], [16]], RATE: [DIVERGING]})
    with pytest.raises(DataError) as caught:
        run_sweep(sweep, make_trials(sweep, store, tmp_path), tmp_path, local=True)
    assert str(caught.value).startswith(
        "at least one trial must finish, none of 2 has; 000-down_dims-8-learning_rate-1e-30: training loss must stay"
    )
    assert "\n" not in str(caught.value)
    assert [line["status"] for line in read_results(tmp_path)] == ["failed", "failed"]
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("population", [1, 2])
def test_a_folder_that_cannot_be_written(store: TransitionStore, tmp_path: Path, population: int) -> None:
    sweep = make_sweep({RATE: [GOOD, POOR]}, population=population)
    (tmp_path / "trials").write_text("in the way")
    with pytest.raises(ConfigError, match=r"run folder cannot be written: .*: Not a directory"):
        run_sweep(sweep, make_trials(sweep, store, tmp_path), tmp_path, local=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(store: TransitionStore, tmp_path: Path) -> None:
    sweep = make_sweep()
    trials = make_trials(sweep, store, tmp_path, device="cuda")
    with pytest.raises(ConfigError, match="device 'cuda' must exist"):
        run_sweep(sweep, trials, tmp_path, local=True)
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_without_gpus(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    assert trial_resources(make_sweep(), ["auto", "cpu"]) == {"cpu": 1.0}
    with pytest.raises(ConfigError, match="--device cuda needs a GPU: the cluster has none"):
        trial_resources(make_sweep(), ["cpu", "cuda"])


def test_a_trial_reports_its_last_row_once_it_is_evaluated(store: TransitionStore, tmp_path: Path) -> None:
    """Early stopping may end a trial at any report: ended at the last one, it would have trained for nothing."""
    trial = make_trials(make_sweep(num_epochs=4), store, tmp_path)[0]
    folder = Path(trial.run.run_dir)
    seen: list[tuple[float, bool]] = []

    def on_metrics(metrics: Metrics) -> None:
        seen.append((metrics["epoch"], (folder / "quality.json").exists()))

    in_order = [(1, False), (2, False), (3, False), (4, True)]
    run_trial(trial, (1,), on_metrics)
    assert seen == in_order
    seen.clear()
    before = checkpoint_times([trial])
    run_trial(trial, (1,), on_metrics)
    assert seen == [(epoch, True) for epoch, _ in in_order]
    seen.clear()
    forget_the_evaluation(trial, tmp_path)
    run_trial(trial, (1,), on_metrics)
    assert seen == in_order
    assert checkpoint_times([trial]) == before


def test_a_killed_trial_replays_what_its_checkpoint_holds(store: TransitionStore, tmp_path: Path) -> None:
    """Of six epochs and two checkpoints, a kill in the fifth loses the fourth and fifth, and a torn line of the CSV."""
    sweep = make_sweep(num_epochs=6)
    whole, killed = (make_trials(sweep, store, tmp_path / name)[0] for name in ("whole", "killed"))
    expected: list[Metrics] = []
    run_trial(whole, (2,), expected.append)

    class Killed(BaseException):
        pass

    def kill_at_5(metrics: Metrics) -> None:
        if metrics["epoch"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run_trial(killed, (2,), kill_at_5)
    with (Path(killed.run.run_dir) / "metrics.csv").open("a") as file:
        file.write("1")
    (Path(killed.run.run_dir) / "error.txt").write_text("of an earlier attempt")
    seen: list[Metrics] = []
    reached: list[int] = []

    def on_metrics(metrics: Metrics) -> None:
        seen.append(metrics)
        reached.append(len(list_checkpoints(killed.run.run_dir)))

    run_trial(killed, (2,), on_metrics)
    assert [metrics["epoch"] for metrics in seen] == [1, 2, 3, 4, 5, 6]
    assert reached[:3] == [1, 1, 1]
    assert [untimed(metrics) for metrics in seen] == [untimed(metrics) for metrics in expected]
    rows = [collect_rows([trial])[0] for trial in (whole, killed)]
    assert without_times(rows[:1]) == without_times(rows[1:])
    assert not (Path(killed.run.run_dir) / "error.txt").exists()


def untimed(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if name not in (*TIMES, "step")}


def test_a_local_sweep_is_continued(swept: tuple[Path, list[SweepRow]], store: TransitionStore, tmp_path: Path) -> None:
    """What has ended is not touched; what has diverged is tried again."""
    sweep = make_sweep()
    trials = make_trials(sweep, store, tmp_path)
    first = run_sweep(sweep, trials, tmp_path, local=True)
    assert without_times(first) == without_times(swept[1])
    forget_the_evaluation(trials[0], tmp_path)
    before = checkpoint_times(trials)
    quality = (Path(trials[2].run.run_dir) / "quality.json").stat().st_mtime_ns
    ended: list[None] = []
    again = run_sweep(sweep, trials, tmp_path, local=True, on_trial=lambda: ended.append(None))
    assert without_times(again) == without_times(first)
    assert checkpoint_times(trials) == before
    assert (Path(trials[2].run.run_dir) / "quality.json").stat().st_mtime_ns == quality
    assert len(ended) == len(trials)


def test_on_ray_it_is_the_same_sweep(
    swept: tuple[Path, list[SweepRow]], store: TransitionStore, tmp_path: Path, ray_session: None
) -> None:
    """The same errors from the same seeds, a diverged network included, and one W&B run per trial in one group."""
    sweep = make_sweep()
    trials = make_trials(sweep, store, tmp_path, tracking={"mode": "offline", "group": GROUP})
    ended: list[None] = []
    rows = run_sweep(sweep, trials, tmp_path, max_concurrent=2, on_trial=lambda: ended.append(None))
    assert without_times(rows) == without_times(swept[1])
    assert len(ended) == len(trials)
    ours, theirs = (load_model(folder / "best").state_dict() for folder in (tmp_path, swept[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    recorded = [list(Path(trial.run.run_dir).glob("wandb/offline-run-*/*.wandb")) for trial in trials]
    assert [len(files) for files in recorded] == [1] * len(trials)
    assert len({file.stem for (file,) in recorded}) == len(trials)
    # The run's own field, which is not in quotes as in the recorded config.
    assert all(re.search(rb'(?<!")all-in-one(?!")', file.read_bytes()) for (file,) in recorded)
    assert len(list(tmp_path.rglob("*.wandb"))) == len(trials)


def test_early_stopping_and_its_resume_on_ray(store: TransitionStore, tmp_path: Path, ray_session: None) -> None:
    """One trial at a time makes it deterministic: each poor network stops at the first rung, after the good one."""
    sweep = make_sweep(
        {"base": ["none"], RATE: [GOOD, POOR, POOR / 2], "num_inference_steps": [1, 2]},
        num_epochs=8,
        asha={"grace_share": 0.25, "reduction_factor": 2},
    )
    trials = make_trials(sweep, store, tmp_path)
    rows = run_sweep(sweep, trials, tmp_path, max_concurrent=1)
    summary = [(row.status, row.settings[RATE], row.num_inference_steps, row.epochs) for row in rows]
    assert [each[:2] for each in summary[:2]] == [("finished", GOOD)] * 2
    assert sorted(summary[2:]) == [("stopped early", POOR / 2, 2, 2), ("stopped early", POOR, 2, 2)]
    assert all(row.energy_score is None and row.val_nrmse is not None for row in rows[2:])
    forget_the_evaluation(trials[0], tmp_path)
    before = checkpoint_times(trials)
    again = run_sweep(sweep, trials, tmp_path, max_concurrent=1)
    assert without_times(again) == without_times(rows)
    assert checkpoint_times(trials) == before
