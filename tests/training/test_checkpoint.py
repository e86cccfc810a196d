from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from invdyn.errors import ConfigError, DataError
from invdyn.models.registry import build_model
from invdyn.training import checkpoint
from invdyn.training.checkpoint import (
    CHECKPOINTS,
    SAMPLING_FILE,
    STATE_FILE,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_trainer_state,
    save_checkpoint,
)
from invdyn.training.loop import train_loop
from invdyn.training.run_config import RunConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.store import TransitionStore
from tests.training.runs import CPU, LINEAR, dataset_config, make_dataset, run_config

STATE: dict[str, Any] = {"epoch": 1, "step": 1}


@pytest.fixture
def config(store: TransitionStore, tmp_path: Path) -> RunConfig:
    return run_config(store, tmp_path / "run")


def save(config: RunConfig, step: int, metrics: dict[str, float] | None = None, **weights: torch.Tensor) -> Path:
    model = build_model(config.model, config.state_dim, config.action_dim)
    return save_checkpoint(config.run_dir, config, step, model.state_dict() | weights, STATE, metrics or {})


def names(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.run_dir) / CHECKPOINTS).iterdir())


def test_model_comes_back_whole(store: TransitionStore, config: RunConfig) -> None:
    torch.manual_seed(3)
    model = build_model(config.model, config.state_dim, config.action_dim)
    model.fit_normalization(store.moments)
    folder = save_checkpoint(config.run_dir, config, 7, model.state_dict(), STATE, {"val_loss": 0.5, "epoch": 1})
    loaded = load_checkpoint(config.run_dir)
    assert loaded.folder == folder
    assert str(loaded.run_dir) == config.run_dir
    assert loaded.config == config
    assert loaded.metrics == {"val_loss": 0.5, "epoch": 1}
    assert not loaded.model.training
    rows = store.load("test")
    arguments = torch.from_numpy(rows["state"]), torch.from_numpy(rows["next_state"])
    for path in (config.run_dir, folder):
        sampled = load_model(path).sample(*arguments, 3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(sampled, model.sample(*arguments, 3, generator=torch.Generator().manual_seed(0)))


def test_a_checkpoint_may_be_moved_out_of_its_run(config: RunConfig, tmp_path: Path) -> None:
    moved = shutil.move(save(config, 1), tmp_path / "best")
    assert load_checkpoint(moved).run_dir == tmp_path / "best"


def test_latest_two_and_the_best_are_kept(config: RunConfig) -> None:
    for step, loss in enumerate([0.5, 0.1, 0.4, 0.3, float("nan"), 0.2], start=1):
        save(config, step, {"val_loss": loss})
    assert names(config) == ["step-000000002", "step-000000005", "step-000000006"]
    assert find_checkpoint(config.run_dir).name == "step-000000002"
    save(config, 7, {"val_loss": 0.1})
    assert find_checkpoint(config.run_dir).name == "step-000000007"  # of equally good ones the later
    assert names(config) == ["step-000000006", "step-000000007"]


def test_the_best_is_of_the_last_stage(config: RunConfig) -> None:
    """A base alone may have a lower loss than the flow on top of it, which is not trained there at all."""
    for step, (stage, loss) in enumerate([(0, 0.3), (0, 0.2), (1, 0.9), (1, 0.8), (1, 0.85), (1, 0.95)], start=1):
        save(config, step, {"stage": stage, "val_loss": loss})
        if step == 2:
            assert find_checkpoint(config.run_dir).name == "step-000000002"
    assert find_checkpoint(config.run_dir).name == "step-000000004"
    assert names(config) == ["step-000000004", "step-000000005", "step-000000006"]


def test_how_far_training_had_come(config: RunConfig, tmp_path: Path) -> None:
    """The best checkpoint of a run that ended may be an earlier one, and keeps it when it is moved."""
    save(config, 1, {"epoch": 1, "stage": 0, "val_loss": 0.3})
    assert load_checkpoint(config.run_dir).unfinished == "unfinished: epoch 1 of 4; its flow is not trained yet"
    best = save(config, 3, {"epoch": 3, "stage": 1, "val_loss": 0.1})
    assert load_checkpoint(config.run_dir).unfinished == "unfinished: epoch 3 of 4"
    save(config, 4, {"epoch": 4, "stage": 1, "val_loss": 0.2})
    (best / SAMPLING_FILE).write_text('{"chosen": {"solver": "euler", "num_inference_steps": 1}, "curve": []}')
    for path in (config.run_dir, best, shutil.copytree(best, tmp_path / "moved")):
        assert load_checkpoint(path).folder.name in (best.name, "moved")
        assert load_checkpoint(path).unfinished is None
    (best / SAMPLING_FILE).unlink()
    assert load_checkpoint(config.run_dir).unfinished is None


def test_a_model_without_steps_is_finished(store: TransitionStore, tmp_path: Path) -> None:
    train_loop(run_config(store, tmp_path / "linear", LINEAR), CPU)
    assert load_checkpoint(tmp_path / "linear").unfinished is None


def test_without_a_validation_loss_the_latest_counts(config: RunConfig) -> None:
    for step in (1, 2, 3):
        save(config, step)
    assert find_checkpoint(config.run_dir).name == "step-000000003"
    assert names(config) == ["step-000000002", "step-000000003"]


def test_what_a_state_is_a_view_of_is_not_written(config: RunConfig) -> None:
    of_population = torch.zeros(1000, 50)
    folder = save_checkpoint(config.run_dir, config, 1, {}, {"weights": of_population[3].view(5, 10)}, {})
    assert (folder / STATE_FILE).stat().st_size < 4 * of_population.numel()
    assert load_trainer_state(folder, torch.device("cpu"))["weights"].shape == (5, 10)


@pytest.mark.parametrize("breaks", ["save_file", "torch.save", "os.replace"])
def test_a_failed_write_leaves_earlier_checkpoints_and_no_trace(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save(config, 1, {"val_loss": 1.0})
    before = {path.name: path.read_bytes() for path in list_checkpoints(config.run_dir)[0].iterdir()}
    where, _, name = breaks.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr({"": checkpoint, "torch": torch, "os": os}[where], name, fail)
        with pytest.raises(DataError, match=r"cannot write checkpoint .*step-000000002.*No space left.*--resume"):
            save(config, 2)
    assert names(config) == ["step-000000001"]
    assert {path.name: path.read_bytes() for path in list_checkpoints(config.run_dir)[0].iterdir()} == before
    save(config, 2)
    assert names(config) == ["step-000000001", "step-000000002"]


@pytest.mark.parametrize(("weights", "limit"), [(9, 1000), (5000, 9000)])
def test_disk_full(config: RunConfig, monkeypatch: pytest.MonkeyPatch, weights: int, limit: int) -> None:
    """While the weights are written, and later, in the middle of the trainer's state."""
    monkeypatch.setitem(STATE, "weights", torch.zeros(weights))
    save(config, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(DataError, match="cannot write checkpoint"):
            save(config, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(config) == ["step-000000001"]


def test_killed_while_writing(config: RunConfig, repository: Path) -> None:
    save(config, 1)
    program = f"""
import os, signal, torch
from invdyn.training import checkpoint
from invdyn.training.run_config import RunConfig
config = RunConfig.load({str(list_checkpoints(config.run_dir)[0])!r})
torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint(config.run_dir, config, 2, {{"x": torch.zeros(9)}}, {{}}, {{}})
"""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(config)) == 2  # it was writing
    assert [path.name for path in list_checkpoints(config.run_dir)] == ["step-000000001"]
    save(config, 2)
    assert names(config) == ["step-000000001", "step-000000002"]


def test_killed_while_removing_an_old_one(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name goes first: a half removed folder is never taken for a checkpoint."""
    for step in (1, 2):
        save(config, step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        save(config, 3)
    assert [path.name for path in list_checkpoints(config.run_dir)] == ["step-000000002", "step-000000003"]
    save(config, 4)
    assert names(config) == ["step-000000003", "step-000000004"]


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_trainer_state_is_refused_and_does_not_run(config: RunConfig, tmp_path: Path) -> None:
    folder, trace = save(config, 1), tmp_path / "it-ran"
    torch.save({"epoch": 1, "step": 1, "weights": Malicious(trace)}, folder / "trainer_state.pt")
    with pytest.raises(DataError, match=r"^trainer state cannot be loaded: [^\n]*$"):
        load_trainer_state(folder, torch.device("cpu"))
    with pytest.raises(DataError, match="trainer state cannot be loaded"):
        train_loop(config, CPU)
    assert not trace.exists()
    torch.load(folder / "trainer_state.pt", weights_only=False)
    assert trace.exists()  # the attack itself works


def test_trainer_states_that_cannot_be_used(config: RunConfig) -> None:
    folder = save(config, 1)
    path = folder / "trainer_state.pt"
    whole = path.read_bytes()
    for content in (
        b"",
        b"\x00" * 100,
        b"not a pickle",
        whole[:100],
        whole[: len(whole) // 2],
        whole[: len(whole) - 30],
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^trainer state cannot be loaded: [^\n]*$"):
            load_trainer_state(folder, torch.device("cpu"))
    path.unlink()
    with pytest.raises(DataError, match="trainer state cannot be loaded"):
        load_trainer_state(folder, torch.device("cpu"))
    torch.save([1, 2], path)
    with pytest.raises(DataError, match=r"must be a mapping: .* holds list"):
        load_trainer_state(folder, torch.device("cpu"))
    torch.save({"epoch": 1, "step": 1, "weights": {"strange": torch.zeros(2)}}, path)
    with pytest.raises(DataError, match=r"^trainer state does not fit the run: [^\n]*$"):
        train_loop(config, CPU)


def test_damaged_weights(config: RunConfig) -> None:
    folder = save(config, 1)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\xff" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^checkpoint cannot be loaded: [^\n]*model.safetensors[^\n]*$"):
            load_model(config.run_dir)


def test_weights_of_another_model(config: RunConfig) -> None:
    save(config, 1, strange=torch.zeros(2))
    with pytest.raises(DataError, match=r"^checkpoint cannot be loaded: [^\n]*strange"):
        load_model(config.run_dir)


def test_damaged_metrics_and_config(config: RunConfig) -> None:
    folder = save(config, 1)
    for text in ("{", "[]"):
        (folder / "metrics.json").write_text(text)
        with pytest.raises(DataError, match="checkpoint metrics"):
            load_model(folder)
    (folder / "metrics.json").write_text(json.dumps({}))
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="config file not found"):
        load_model(folder)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give a run folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no finished checkpoint"):
        load_model(tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises(DataError, match=r"README\.md is a file; give a run folder"):
        load_model(tmp_path / "README.md")


def test_the_folder_of_a_sweep_names_its_best_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    shutil.move(save(config, 1), tmp_path / "sweep/best")
    with pytest.raises(DataError, match=f"holds no finished checkpoint; give {tmp_path}/sweep/best$"):
        load_model(tmp_path / "sweep")
    load_model(tmp_path / "sweep/best")


def test_dimensions_of_another_dataset(config: RunConfig, tmp_path: Path) -> None:
    train_loop(config.replace(training=config.training.replace(num_epochs=1)), CPU)
    other = make_dataset(tmp_path, action_dim=2)
    model = load_model(config.run_dir)
    rows = {name: torch.from_numpy(values) for name, values in other.load("test").items()}
    with pytest.raises(DataError, match=r"action must be \(\d+, 1\), got \(\d+, 2\)"):
        model.loss(rows["state"], rows["action"], rows["next_state"])
    with pytest.raises(DataError, match="start a new run"):
        train_loop(config.replace(dataset_path=str(other.path)), CPU)


def test_constant_dims_are_restored_at_prediction(tmp_path: Path) -> None:
    made = make_dataset(tmp_path, action_dim=2)
    with h5py.File(next((tmp_path / "sequence").rglob("*.hdf5")), "r+") as file:
        file["data/action"][:, 0] = 0.75
    folder = tmp_path / "filtered"
    options = {"filters": {"drop_constant_dims": True}, "output_path": str(folder)}
    store = create_dataset(dataset_config(tmp_path, **options), local=True)
    assert (made.action_dim, store.action_dim) == (2, 1)
    config = run_config(store, tmp_path / "run", LINEAR)
    assert RunConfig.from_values(config.to_values(), where="test") == config
    inner = build_model(config.model, config.state_dim, config.action_dim)
    inner.fit_normalization(store.moments)
    save_checkpoint(config.run_dir, config, 1, inner.state_dict(), STATE, {})

    state, next_state = (torch.from_numpy(store.load("test")[name]) for name in ("state", "next_state"))
    predicted = load_model(config.run_dir).sample(state, next_state)
    assert (predicted[..., 0] == 0.75).all()
    assert torch.equal(predicted[..., 1:], inner.sample(state, next_state))
    assert load_checkpoint(config.run_dir).model.action_dim == 1  # fits the dataset's rows
