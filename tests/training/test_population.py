from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from invdyn.errors import ConfigError, TrainingDiverged
from invdyn.training import loop, population
from invdyn.training.checkpoint import list_checkpoints, load_checkpoint, load_model, load_trainer_state
from invdyn.training.loop import train_loop
from invdyn.training.population import population_key, train_population
from invdyn.training.run_config import RunConfig
from invdyn.training.student import STUDENT
from invdyn.training.worker import Metrics
from invdyn.transitions.store import TransitionStore
from tests.training.runs import CPU, FLOW, LINEAR, TWO_STAGES, assert_same_run, read_metrics_csv, run_config
from tests.training.test_compiled import compiles

pytestmark = pytest.mark.usefixtures("without_shape_checks")

MLP = {**FLOW, "down_dims": [8, 8]}
UNET = {**MLP, "network": "unet", "prediction": "velocity", "down_dims": [4]}
# Rounding of batched products, grown over the steps of a run.
TOLERANCE = 1e-4
MOMENT_TOLERANCE = 1e-3  # of Adam's moments, which are as large as gradients


class Stopped(Exception):
    """What a test stops a population with."""


def members(store: TransitionStore, folder: Path, model: dict[str, Any] = MLP, **values: Any) -> list[RunConfig]:
    """Return three runs that differ in all that runs of a population may."""
    own = [
        {"seed": 0, "learning_rate": 1e-2},
        {"seed": 1, "learning_rate": 3e-3, "weight_decay": 0.1, "ema_decay": 0.9},
        {"seed": 2, "learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.2},
    ]
    common = {"num_epochs": 4, "checkpoints": 2, "compile": False, **values}
    return [run_config(store, folder / str(i), model, **{**common, **each}) for i, each in enumerate(own)]


def train(configs: list[RunConfig], **callbacks: Any) -> list[Metrics]:
    results = train_population(configs, [replace(CPU, **callbacks)] * len(configs))
    assert all(isinstance(result, dict) for result in results), results
    return results  # type: ignore[return-value]


def assert_equal_to_rounding(found: Path, expected: Path) -> None:
    """The same weights, moving average, optimizer and metrics."""
    ours, theirs = (list_checkpoints(folder) for folder in (found, expected))
    assert [folder.name for folder in ours] == [folder.name for folder in theirs]
    states = [load_trainer_state(each[-1], torch.device("cpu")) for each in (ours, theirs)]
    assert states[0]["step"] == states[1]["step"]
    for name in ("weights", "average"):
        for key, value in states[1][name].items():
            torch.testing.assert_close(states[0][name][key], value, atol=TOLERANCE, rtol=0)
    groups = [state["optimizer"]["param_groups"] for state in states]
    assert groups[0] == groups[1]
    for key, value in states[1]["optimizer"]["state"].items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                states[0]["optimizer"]["state"][key][name], value[name], atol=MOMENT_TOLERANCE, rtol=1e-3
            )
    rows = [read_metrics_csv(folder) for folder in (found, expected)]
    assert [list(row) for row in rows[0]] == [list(row) for row in rows[1]]
    for mine, other in zip(*rows, strict=True):
        for name, value in other.items():
            assert float(mine[name]) == pytest.approx(float(value), rel=1e-3), name


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (MLP, {}),
        (MLP, {"batch_size": 25, "num_epochs": 2}),
        (TWO_STAGES, {"base_fraction": 0.4}),
        (UNET, {"max_grad_norm": 0.5}),
        pytest.param(MLP, {"compile": True}, marks=[compiles]),
    ],
    ids=["mlp", "two chunks an epoch", "two stages", "unet", "compiled"],
)
def test_each_run_equals_the_one_trained_alone(
    store: TransitionStore, tmp_path: Path, model: dict[str, Any], values: dict[str, Any]
) -> None:
    configs = members(store, tmp_path / "at once", model, **values)
    results = train(configs)
    alone = members(store, tmp_path / "alone", model, **{**values, "compile": False})
    for config, own, result in zip(configs, alone, results, strict=True):
        expected = train_loop(own, CPU)
        assert_equal_to_rounding(Path(config.run_dir), Path(own.run_dir))
        assert result.keys() == expected.keys()
        assert result["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
    errors = [result["val_loss"] for result in results]
    assert min(abs(a - b) for a, b in zip(errors, errors[1:] + errors[:1], strict=True)) > 1e-3


def test_runs_are_whole_runs(store: TransitionStore, tmp_path: Path) -> None:
    """Loadable, continued by the plain loop, and of a config that says what they are."""
    told: list[float] = []
    configs = members(store, tmp_path, num_epochs=2, student_steps=1)

    def on_trained(model: torch.nn.Module) -> Metrics:
        told.append(float(model.training))
        return {}

    results = train(configs, on_trained=on_trained)
    assert told == [0.0] * 3
    for config, result in zip(configs, results, strict=True):
        checkpoint = load_checkpoint(config.run_dir)
        assert checkpoint.config.training == config.training
        assert checkpoint.config.run_dir == config.run_dir
        assert checkpoint.metrics["val_loss"] == pytest.approx(min(_losses(config)), rel=1e-6)
        assert load_checkpoint(Path(config.run_dir) / STUDENT).config.model.num_inference_steps == 1  # type: ignore[attr-defined]
        rows = {name: torch.from_numpy(values[:5]) for name, values in store.load("val").items()}
        assert load_model(config.run_dir).sample(rows["state"], rows["next_state"]).shape == (1, 5, 1)
        again = train_loop(config, CPU)
        assert again == {name: result[name] for name in again}


def _losses(config: RunConfig) -> list[float]:
    return [float(row["val_loss"]) for row in read_metrics_csv(Path(config.run_dir))]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_population_equals_an_uninterrupted_one(store: TransitionStore, tmp_path: Path, stop: int) -> None:
    """Checkpoints come after epochs 2 and 4; stopped in the fourth, only the first run has written its last."""
    train(members(store, tmp_path / "whole"))
    configs = members(store, tmp_path / "stopped")

    def on_metrics(metrics: Metrics) -> None:
        if metrics["epoch"] == stop:
            raise Stopped

    with pytest.raises(Stopped):
        train(configs, on_metrics=on_metrics)
    written = [len(list_checkpoints(config.run_dir)) for config in configs]
    assert written == {1: [0, 0, 0], 3: [1, 1, 1], 4: [2, 1, 1]}[stop]
    train(configs)
    for config in configs:
        assert_same_run(Path(config.run_dir), tmp_path / "whole" / Path(config.run_dir).name)


@compiles
def test_runs_keep_the_kind_of_step_of_their_population(
    store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of them are continued: compiling pays for all together, for none by itself."""
    steps = store.num_rows("train") // 64
    monkeypatch.setitem(loop.COMPILE_PAYS_STEPS, "cpu", 3 * steps)
    configs = members(store, tmp_path, num_epochs=1, compile=None)
    train(configs)
    assert all(loop.choose_compiled(config, CPU, steps) for config in configs)
    assert not loop.choose_compiled(configs[0].replace(run_dir=str(tmp_path / "new")), CPU, steps)


def test_a_run_that_diverges_ends_alone(store: TransitionStore, tmp_path: Path) -> None:
    configs = members(store, tmp_path / "at once")
    recipe = configs[1].training.replace(learning_rate=1e30)
    configs[1] = configs[1].replace(training=recipe)
    first, second, third = train_population(configs, [CPU] * 3)
    assert isinstance(second, TrainingDiverged)
    assert "lower learning_rate (1e+30)" in str(second)
    assert list_checkpoints(configs[1].run_dir) == []
    assert "must stay finite" in (Path(configs[1].run_dir) / "train.log").read_text()
    alone = members(store, tmp_path / "alone")
    for result, config, own in ((first, configs[0], alone[0]), (third, configs[2], alone[2])):
        assert isinstance(result, dict)
        train_loop(own, CPU)
        assert_equal_to_rounding(Path(config.run_dir), Path(own.run_dir))


def test_what_runs_may_differ_in(store: TransitionStore, tmp_path: Path) -> None:
    base = run_config(store, tmp_path / "base")
    same = run_config(store, tmp_path / "same", seed=5, learning_rate=1.0, weight_decay=0.5, ema_decay=0.5)
    assert population_key(base) == population_key(same)
    others = [
        run_config(store, tmp_path / "other", **values)
        for values in (
            {"batch_size": 32},
            {"num_epochs": 7},
            {"ema_decay": None},
            {"max_grad_norm": 1.0},
            {"precision": "bfloat16"},
            {"checkpoints": 3},
        )
    ]
    others.append(run_config(store, tmp_path / "other", {**FLOW, "down_dims": [8]}))
    assert len({population_key(config) for config in (base, *others)}) == len(others) + 1
    with pytest.raises(ConfigError, match=r"^runs that are trained at once must differ in their seeds, learning rates"):
        train_population([base, others[0]], [CPU] * 2)
    with pytest.raises(ConfigError, match="folders of their own"):
        train_population([base, base], [CPU] * 2)
    linear = [run_config(store, tmp_path / f"linear{seed}", LINEAR, seed=seed) for seed in (0, 1)]
    assert [len(list_checkpoints(config.run_dir)) for config in linear if train([config])] == [1, 1]


def test_rows_that_do_not_fit(store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "fits_in_memory", lambda *_: False)
    with pytest.raises(ConfigError, match=r"keep the train rows in memory: [\d,]+ rows do not fit half .* on cpu"):
        train(members(store, tmp_path))


def test_a_population_of_one_is_a_run(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "one", num_epochs=2)
    (result,) = train([config])
    own = run_config(store, tmp_path / "alone", num_epochs=2)
    assert result["val_loss"] == train_loop(own, CPU)["val_loss"]
    assert_same_run(tmp_path / "one", tmp_path / "alone")
