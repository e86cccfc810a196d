from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invdyn.errors import DataError, TrainingDiverged
from invdyn.evaluation.metrics import nrmse
from invdyn.models.registry import build_model
from invdyn.training import loop
from invdyn.training.checkpoint import list_checkpoints, load_checkpoint, load_model
from invdyn.training.loop import train_loop
from invdyn.training.run_config import RunConfig
from invdyn.training.trainer import learning_rates
from invdyn.training.validation import Validation
from invdyn.training.worker import Metrics, Worker
from invdyn.transitions.store import TransitionStore
from tests.training.runs import (
    CPU,
    FLOW,
    LINEAR,
    TWO_STAGES,
    assert_same_run,
    make_dataset,
    read_metrics_csv,
    run_config,
)

MLP = {"_target_": "invdyn.models.MLPRegression", "name": "mlp", "down_dims": [16, 16]}
UNET = {**FLOW, "network": "unet", "prediction": "velocity", "down_dims": [8, 8]}


class Stopped(Exception):
    """What a test stops a run with."""


def stop_at(epoch: int) -> Worker:
    def on_metrics(metrics: Metrics) -> None:
        if metrics["epoch"] == epoch:
            raise Stopped

    return replace(CPU, on_metrics=on_metrics)


def test_metrics_and_columns(store: TransitionStore, tmp_path: Path) -> None:
    seen: list[Metrics] = []
    config = run_config(store, tmp_path / "run", num_epochs=3)
    final = train_loop(config, replace(CPU, on_metrics=seen.append))
    steps = store.num_rows("train") // 64
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    names = ["epoch", "train_loss", "val_loss", "val_nrmse", "learning_rate", "steps_per_s", "elapsed_s"]
    assert header.split(",") == ["step", *names]
    assert list(final) == names
    rows = read_metrics_csv(tmp_path / "run")
    assert [(int(row["step"]), int(row["epoch"])) for row in rows] == [(steps * n, n) for n in (1, 2, 3)]
    assert [metrics["step"] for metrics in seen] == [steps, 2 * steps, 3 * steps]
    assert float(rows[-1]["val_loss"]) == final["val_loss"] == load_checkpoint(config.run_dir).metrics["val_loss"]
    assert float(rows[-1]["learning_rate"]) == learning_rates(config.training, 3 * steps - 1, 1, 3 * steps)
    assert final["steps_per_s"] > 0
    log = (tmp_path / "run/train.log").read_text()
    assert f"rows (resident); 3 epochs of {steps} steps; 1 worker(s) on cpu\n" in log
    assert "epoch 3/3" in log


def test_train_loss_is_the_mean_of_all_steps(store: TransitionStore, tmp_path: Path) -> None:
    """With a negligible learning rate it is the loss of the untrained network; the last chunk has few steps."""
    size = store.num_rows("train") // 65
    config = run_config(store, tmp_path / "run", MLP, num_epochs=1, learning_rate=1e-12, batch_size=size, resident=True)
    found = train_loop(config, CPU)["train_loss"]
    torch.manual_seed(config.training.seed)
    model = build_model(config.model, 2, 1)
    model.fit_normalization(store.moments)
    chunks = list(loop.make_batches(model, store, config, CPU).epoch(0))
    assert len(chunks[-1][0]) < len(chunks[0][0]) / 4
    losses = [float(model(*batch)) for chunk in chunks for batch in zip(*chunk, strict=True)]
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("model", [FLOW, MLP, UNET], ids=lambda model: model.get("network", "regression"))
def test_training_resident_or_streamed(
    store: TransitionStore, tmp_path: Path, model: dict[str, Any], resident: bool
) -> None:
    train_loop(run_config(store, tmp_path / "run", model, num_epochs=15, resident=resident), CPU)
    kind = "resident" if resident else "streamed"
    assert f"({kind})" in (tmp_path / "run/train.log").read_text()
    rows = read_metrics_csv(tmp_path / "run")
    for name in ("train_loss", "val_loss"):
        assert float(rows[-1][name]) < 0.95 * float(rows[0][name])


def test_training_beats_the_linear_inverse(store: TransitionStore, tmp_path: Path) -> None:
    linear = train_loop(run_config(store, tmp_path / "linear", LINEAR), CPU)["val_nrmse"]
    trained = train_loop(run_config(store, tmp_path / "run", MLP, num_epochs=15), CPU)["val_nrmse"]
    assert trained < 0.5 * linear


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "invdyn.models.NearestNeighbours", "num_neighbours": 4, "max_fit_rows": 1000},
        {"_target_": "invdyn.models.GradientBoostedTrees", "max_iter": 60},
    ],
    ids=lambda model: model["_target_"].rpartition(".")[2],
)
def test_models_fitted_to_rows_beat_the_linear_inverse(
    store: TransitionStore, tmp_path: Path, model: dict[str, Any]
) -> None:
    linear = train_loop(run_config(store, tmp_path / "linear", LINEAR), CPU)["val_nrmse"]
    config = run_config(store, tmp_path / "run", model)
    metrics = train_loop(config, CPU)
    assert metrics["val_nrmse"] < 0.5 * linear
    count = min(store.num_rows("train"), model.get("max_fit_rows", 10**9))
    assert f"no steps to train, fitted to {count:,} train rows" in (tmp_path / "run/train.log").read_text()
    loaded = load_model(config.run_dir)
    rows = {name: torch.from_numpy(values) for name, values in store.load("test").items()}
    fresh = build_model(config.model, 2, 1)
    assert loaded.state_dict().keys() == fresh.state_dict().keys()
    first, again = (
        loaded.sample(rows["state"], rows["next_state"], generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert float((first[0] - rows["action"]).square().mean().sqrt() / rows["action"].std()) < 0.6 * linear


def test_gaussians_and_mixtures_train(store: TransitionStore, tmp_path: Path) -> None:
    """They end more likely than the linear inverse with its residual taken for a Gaussian."""
    linear = train_loop(run_config(store, tmp_path / "linear", LINEAR), CPU)["val_nrmse"]
    rows = {column: torch.from_numpy(values) for column, values in store.load("val").items()}
    spread = linear * rows["action"].std()
    for name, extra in (("GaussianRegression", {}), ("MixtureDensity", {"num_components": 3})):
        model = {"_target_": f"invdyn.models.{name}", "down_dims": [16, 16], **extra}
        config = run_config(store, tmp_path / name, model, num_epochs=20, max_grad_norm=1.0)
        train_loop(config, CPU)
        density = load_model(config.run_dir).log_prob(rows["state"], rows["action"], rows["next_state"])
        assert density.mean() > -torch.log(spread * math.sqrt(2 * math.pi * math.e)) + 0.3


def test_linear_trains_nothing(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "run", LINEAR)
    metrics = train_loop(config, CPU)
    assert metrics.keys() == {"epoch", "val_loss", "val_nrmse"}
    assert 0 < metrics["val_nrmse"] < 1
    assert [folder.name for folder in list_checkpoints(config.run_dir)] == ["step-000000000"]
    assert "no steps to train" in (tmp_path / "run/train.log").read_text()
    assert train_loop(config, CPU) == metrics
    assert len(read_metrics_csv(tmp_path / "run")) == 1
    model = load_model(config.run_dir)
    assert list(model.parameters()) == []


RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resident": (FLOW, {}),
    "two stages": (TWO_STAGES, {}),  # the second begins after epoch 3
    "streamed": (
        {**UNET, "down_dims": [4]},
        {"resident": False, "ema_decay": None, "schedule": "constant", "max_grad_norm": 1.0},
    ),
}


def run_of_six(store: TransitionStore, folder: Path, kind: str) -> RunConfig:
    model, values = RESUMED[kind]
    return run_config(store, folder, model, num_epochs=6, checkpoints=2, **values)


@pytest.fixture(scope="module", params=RESUMED)
def uninterrupted(
    request: pytest.FixtureRequest, store: TransitionStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A kind of run, and the folder of one that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train_loop(run_of_six(store, folder, request.param), CPU)
    return request.param, folder


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_resumed_run_equals_an_uninterrupted_one(
    store: TransitionStore, tmp_path: Path, uninterrupted: tuple[str, Path], stop: int
) -> None:
    """Checkpoints are written after epochs 3 and 6: before, between, on them, and after the end."""
    kind, whole = uninterrupted
    config = run_of_six(store, tmp_path / "run", kind)
    with pytest.raises(Stopped):
        train_loop(config, stop_at(stop))
    assert len(read_metrics_csv(tmp_path / "run")) == stop
    torch.manual_seed(123)
    final = train_loop(config, CPU)
    assert final["epoch"] == 6
    assert_same_run(tmp_path / "run", whole)
    log = (tmp_path / "run/train.log").read_text()
    assert ("continuing from step" in log) == (stop >= 3)


def test_a_resumed_run_keeps_its_kind_of_batches(
    store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another amount of free memory must not change the order of the rows."""
    monkeypatch.setattr(loop, "fits_in_memory", lambda *_: False)
    config = run_config(store, tmp_path / "run", num_epochs=2, checkpoints=2)
    with pytest.raises(Stopped):
        train_loop(config, stop_at(1))
    monkeypatch.setattr(loop, "fits_in_memory", lambda *_: True)
    train_loop(config, CPU)
    assert (tmp_path / "run/train.log").read_text().count("(streamed)") == 2


def test_workers_stream_when_the_rows_do_not_fit_on_one_of_them(
    store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "fits_in_memory", lambda *_: True)
    other_does_not = replace(CPU, mean=lambda value: value / 2)
    config = run_config(store, tmp_path / "run")
    model = build_model(config.model, 2, 1)
    assert loop.choose_resident(model, store, config, CPU)
    assert not loop.choose_resident(model, store, config, other_does_not)


def test_the_step_of_a_long_run_is_compiled(
    store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continued run keeps the kind of step it started with, whatever is there now."""
    config = run_config(store, tmp_path / "run", num_epochs=2, checkpoints=2)
    long = loop.COMPILE_PAYS_STEPS["cpu"]
    monkeypatch.setattr(loop, "has_compiler", lambda device: True)
    assert loop.choose_compiled(config, CPU, long)
    assert not loop.choose_compiled(config, CPU, long - 1)
    assert not loop.choose_compiled(config, replace(CPU, world_size=2), long)
    assert not loop.choose_compiled(config.replace(compile=False), CPU, long)
    assert loop.choose_compiled(config.replace(compile=True), CPU, 1)
    with pytest.raises(Stopped):
        train_loop(config, stop_at(2))
    assert not loop.choose_compiled(config, CPU, long)
    monkeypatch.setattr(loop, "has_compiler", lambda device: False)
    assert not loop.choose_compiled(config.replace(run_dir=str(tmp_path / "new")), CPU, long)


def test_bfloat16_is_close_to_float32_and_not_the_same(store: TransitionStore, tmp_path: Path) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        config = run_config(store, tmp_path / precision, num_epochs=2, precision=precision)
        losses.append(train_loop(config, CPU)["train_loss"])
        state = load_checkpoint(config.run_dir).model.state_dict()
        assert {value.dtype for value in state.values()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_same_seed_same_run_and_another_seed_another_one(store: TransitionStore, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_loop(run_config(store, tmp_path / name, num_epochs=1, seed=seed), CPU)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert read_metrics_csv(tmp_path / "a") != read_metrics_csv(tmp_path / "c")


def test_every_checkpoint_carries_its_own_metrics(store: TransitionStore, tmp_path: Path) -> None:
    """Also where checkpoints are more frequent than the epochs that are shown."""
    config = run_config(store, tmp_path / "run", num_epochs=25, checkpoints=25)
    with pytest.raises(Stopped):
        train_loop(config, stop_at(7))
    found = [load_checkpoint(folder) for folder in list_checkpoints(config.run_dir)]
    steps = store.num_rows("train") // 64
    assert all(int(c.folder.name.removeprefix("step-")) == c.metrics["epoch"] * steps for c in found)
    assert {6, 7} <= {c.metrics["epoch"] for c in found}


def test_changed_dataset_is_refused(store: TransitionStore, tmp_path: Path) -> None:
    other = make_dataset(tmp_path, seed=1)
    config = run_config(store, tmp_path / "run").replace(dataset_path=str(other.path))
    with pytest.raises(DataError, match=r"^a run must continue on the rows it started with: .*; start a new run$"):
        train_loop(config, CPU)


@pytest.mark.parametrize("learning_rate", [1e30])
def test_diverged(store: TransitionStore, tmp_path: Path, learning_rate: float) -> None:
    config = run_config(store, tmp_path / "run", learning_rate=learning_rate)
    message = (
        r"^training loss must stay finite: it is (nan|inf) by step \d+ \(epoch 1\); lower learning_rate \(1e\+30\) or"
    )
    with pytest.raises(TrainingDiverged, match=message):
        train_loop(config, CPU)
    assert list_checkpoints(config.run_dir) == []


def test_without_a_validation_split(tmp_path: Path) -> None:
    store = make_dataset(tmp_path, val_ratio=0.0, test_ratio=0.1)
    config = run_config(store, tmp_path / "run", num_epochs=2)
    metrics = train_loop(config, CPU)
    assert "val_loss" not in metrics
    assert load_checkpoint(config.run_dir).metrics["epoch"] == 2


def test_the_checkpoint_holds_the_moving_average(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "run", num_epochs=1)
    train_loop(config, CPU)
    folder = list_checkpoints(config.run_dir)[-1]
    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    loaded = load_model(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state["average"].items())
    assert any(not torch.equal(loaded[name], value) for name, value in state["weights"].items())


def test_what_the_finished_model_is_told_goes_to_the_summary(
    store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, float]] = []
    monkeypatch.setattr(loop.Tracker, "summarize", lambda self, values: told.append(values))
    for model in (FLOW, LINEAR):
        config = run_config(store, tmp_path / model["name"], model, num_epochs=1)
        train_loop(config, replace(CPU, on_trained=lambda model: {"training": float(model.training)}))
    assert told == [{"training": 0.0}] * 2


def test_config_of_the_checkpoint_is_the_run(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "run", num_epochs=1)
    train_loop(config, CPU)
    saved = RunConfig.load(list_checkpoints(config.run_dir)[-1])
    assert saved == config.replace(resident=True, compile=False)


def test_a_base_in_training_is_judged_by_its_mean(store: TransitionStore, tmp_path: Path) -> None:
    """The flow on top of it is not trained yet, and its samples say nothing."""
    config = run_config(store, tmp_path / "run", {**TWO_STAGES, "num_inference_steps": 4})
    torch.manual_seed(0)
    model = build_model(config.model, 2, 1).eval()
    model.fit_normalization(store.moments)
    validation = Validation.load(model, store, config, torch.device("cpu"))
    states = validation.rows["state"], validation.rows["next_state"]
    mean = model.sample(*states, num_inference_steps=1, solver="euler")[0]
    expected = nrmse(mean.numpy(), validation.rows["action"].numpy(), validation.action_std)
    found = []
    for stage in (0, 1):
        model.enter_stage(stage)
        found.append(validation.evaluate(model)["val_nrmse"])
    assert found[0] == pytest.approx(expected, rel=1e-6)
    assert found[1] > 1.01 * expected
