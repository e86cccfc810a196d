"""A run or sweep on a storage service is, bit for bit, the one on a disk, and is continued there like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from invdyn import storage
from invdyn.errors import ConfigError, DataError, StorageError
from invdyn.models.flow import FlowInverseDynamics
from invdyn.training.attempt import read_mark
from invdyn.training.checkpoint import BEST, WEIGHTS_FILE, list_checkpoints, load_checkpoint, load_trainer_state
from invdyn.training.distributed import check_run, train
from invdyn.training.followed_log import FollowedLog
from invdyn.training.loop import train_loop
from invdyn.training.run_config import RunConfig, resolve_device
from invdyn.training.sweep_config import SWEEP_FILE, SweepConfig, load_sweep_config
from invdyn.training.trials import Trial
from invdyn.training.tuning import RESULTS_CSV, run_sweep, save_sweep
from invdyn.training.worker import Metrics, Worker
from invdyn.transitions.store import TransitionStore
from invdyn.url_path import UrlPath, as_path, write_whole
from tests import remote as there
from tests.training.runs import LINEAR, TIMES, assert_same_values, run_config


def metrics_of(text: str) -> list[list[str]]:
    """Return the cells of a metrics.csv without the columns that measure time."""
    header, *lines = (line.split(",") for line in text.splitlines())
    keep = [index for index, name in enumerate(header) if name not in TIMES]
    return [[line[index] for index in keep] for line in (header, *lines)]


def assert_same_run(url: str, expected: Path) -> None:
    ours, theirs = list_checkpoints(url), list_checkpoints(expected)
    assert [folder.name for folder in ours] == [folder.name for folder in theirs]
    for folder, local in zip(ours, theirs, strict=True):
        assert (folder / WEIGHTS_FILE).read_bytes() == (local / WEIGHTS_FILE).read_bytes()
        states = [load_trainer_state(each, resolve_device("cpu")) for each in (folder, local)]
        assert_same_values(*states)
    assert metrics_of(storage.read_text(f"{url}/metrics.csv")) == metrics_of((expected / "metrics.csv").read_text())


class Killed(BaseException):
    """Ends a run as nothing in it does."""


def train_until(config: RunConfig, epoch: int) -> None:
    def kill(metrics: Metrics) -> None:
        if metrics["epoch"] == epoch:
            raise Killed

    with pytest.raises(Killed):
        train_loop(config, Worker(resolve_device("cpu"), on_metrics=kill, echo=False))


def test_a_killed_run_is_continued_to_the_same_end(store: TransitionStore, tmp_path: Path, remote: str) -> None:
    train(run_config(store, tmp_path / "whole"), local=True)
    config = run_config(store, f"{remote}/run")
    train_until(config, 2)
    reached = [folder.name for folder in list_checkpoints(config.run_dir)]
    assert len(reached) == 2
    half = f"{config.run_dir}/checkpoints/step-000000999"
    storage.write_bytes(f"{half}/trainer_state.pt", b"what a killed upload leaves: no weights yet")
    assert [folder.name for folder in list_checkpoints(config.run_dir)] == reached
    train(config, local=True, resume=True)
    assert not storage.exists(half)
    assert_same_run(config.run_dir, tmp_path / "whole")
    assert "continuing from step" in storage.read_text(f"{config.run_dir}/train.log")
    best = load_checkpoint(config.run_dir)
    assert isinstance(best.folder, UrlPath)
    assert isinstance(best.model, FlowInverseDynamics)
    assert best.model.num_inference_steps == 2
    assert storage.exists(f"{best.folder}/sampling.json")


def test_a_run_folder_that_is_taken(store: TransitionStore, remote: str) -> None:
    config = run_config(store, f"{remote}/run")
    storage.write_bytes(f"{config.run_dir}/config.yaml", b"of another run")
    with pytest.raises(ConfigError, match=f"run folder exists already: {config.run_dir}; continue it with --resume"):
        train(config, local=True)


def test_memory_is_not_shared(store: TransitionStore) -> None:
    with pytest.raises(ConfigError, match="run_dir must be where workers reach it: memory://run is in the memory"):
        check_run(run_config(store, "memory://run"), local=False)


def test_a_checkpoint_that_storage_does_not_take(
    store: TransitionStore, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(store, f"{s3_bucket}/{tmp_path.name}")
    train_until(config, 1)
    before = there.contents(f"{config.run_dir}/checkpoints")

    def refuse(*_: Any) -> None:
        raise StorageError("no room")

    monkeypatch.setattr(storage, "upload", refuse)
    with pytest.raises(StorageError, match="no room"):
        train(config, local=True, resume=True)
    assert there.contents(f"{config.run_dir}/checkpoints") == before
    monkeypatch.undo()
    (step,) = list_checkpoints(config.run_dir)
    (step / WEIGHTS_FILE).unlink()
    with pytest.raises(DataError, match=f"checkpoint not found: {config.run_dir} holds no finished checkpoint"):
        load_checkpoint(config.run_dir)


def test_a_sweep_and_its_best_model(store: TransitionStore, tmp_path: Path, s3_bucket: str) -> None:
    remote = f"{s3_bucket}/{tmp_path.name}"
    sweep = SweepConfig(
        name="s",
        dataset_config="d",
        model_config_file="m",
        space={"training.learning_rate": [1e-3, 1e-2], "num_inference_steps": [1, 2]},
    )

    def trials(folder: str) -> list[Trial]:
        rates = (1e-3, 1e-2)
        names = [f"{folder}/trials/{rate}" for rate in rates]
        return [
            Trial({"training.learning_rate": rate}, run_config(store, name, learning_rate=rate, num_epochs=2))
            for rate, name in zip(rates, names, strict=True)
        ]

    save_sweep(as_path(remote), sweep)
    assert load_sweep_config(as_path(remote) / SWEEP_FILE, []) == sweep
    expected = run_sweep(sweep, trials(str(tmp_path)), tmp_path, local=True)
    found = run_sweep(sweep, trials(remote), as_path(remote), local=True)
    assert [(row.status, row.settings, row.val_nrmse) for row in found] == [
        (row.status, row.settings, row.val_nrmse) for row in expected
    ]
    assert len(storage.read_text(f"{remote}/{RESULTS_CSV}").splitlines()) == 1 + len(found)
    best = load_checkpoint(f"{remote}/{BEST}")
    assert best.config.run_dir == found[0].run_dir
    weights = load((tmp_path / BEST / WEIGHTS_FILE).read_bytes())
    assert_same_values({name: value for name, value in best.model.state_dict().items() if name in weights}, weights)
    again = run_sweep(sweep, trials(remote), as_path(remote), local=True)  # trials that have ended keep their results
    assert [row.train_s for row in again] == [row.train_s for row in found]


def test_offline_wandb_files_come_along(store: TransitionStore, s3_bucket: str, tmp_path: Path) -> None:
    remote = f"{s3_bucket}/{tmp_path.name}"
    train(run_config(store, f"{remote}/run", LINEAR, tracking={"mode": "offline"}), local=True)
    names = storage.list_names(f"{remote}/run", recursive=True)
    assert any(name.endswith(".wandb") for name in names)
    (run_id,) = {Path(name).stem.removeprefix("run-") for name in names if name.endswith(".wandb")}
    assert storage.read_text(f"{remote}/run/wandb_run_id.txt") == run_id


def test_log_is_followed(remote: str, capfd: pytest.CaptureFixture[str]) -> None:
    log = as_path(f"{remote}/train.log")
    write_whole(log, "before é\n")
    with FollowedLog(log):
        write_whole(log, "before é\nlast words\n")
    assert capfd.readouterr().out == "last words\n"


def test_a_mark_that_cannot_be_read_is_not_missing(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for missing, it would end a healthy run as one that another attempt has taken over."""
    run_dir = as_path(remote) / "run"
    assert read_mark(run_dir) is None
    with there.silence(remote, monkeypatch), pytest.raises(StorageError, match="storage does not answer"):
        read_mark(run_dir)
