from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from invdyn.errors import ConfigError, DataError
from invdyn.evaluation.sampling_choice import CANDIDATES, TOLERANCE
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting
from invdyn.training.checkpoint import (
    SAMPLING_FILE,
    choose_steps,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from invdyn.training.loop import train_loop
from invdyn.transitions.store import TransitionStore
from tests.training.runs import CPU, FLOW, make_dataset, run_config

CHOSEN = {**FLOW, "prediction": "angular", "base": "mlp", "base_dims": [16, 16], "num_inference_steps": None}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TransitionStore:
    return make_dataset(tmp_path_factory.mktemp("sampling"))


@pytest.fixture(scope="module")
def run_dir(store: TransitionStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "chosen"
    train_loop(run_config(store, folder, CHOSEN, checkpoints=3), CPU)
    return folder


def test_solver_and_steps_are_chosen_and_stored_with_their_curve(run_dir: Path) -> None:
    folder = find_checkpoint(run_dir)
    values = json.loads((folder / SAMPLING_FILE).read_text())
    assert len(values["curve"]) == len(CANDIDATES)
    chosen = next(q for q in values["curve"] if values["chosen"].items() <= q.items())
    assert chosen["energy_excess"] <= max(TOLERANCE, 2 * chosen["excess_error"])
    model = load_checkpoint(run_dir).model
    assert isinstance(model, FlowInverseDynamics)
    assert (model.solver, model.num_inference_steps) == tuple(values["chosen"].values())
    assert model.spreads == {
        SamplingSetting(q["solver"], q["num_inference_steps"]): tuple(q["spread"]) for q in values["curve"]
    }
    assert (list_checkpoints(run_dir)[-1] / SAMPLING_FILE).exists()


def test_the_chosen_setting_is_calibrated_on_all_rows(
    store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("invdyn.training.sampling.CHOICE_ROWS", 40)
    train_loop(run_config(store, tmp_path / "run", CHOSEN, num_epochs=1), CPU)
    values = json.loads((find_checkpoint(tmp_path / "run") / SAMPLING_FILE).read_text())
    rows = {
        (q["solver"], q["num_inference_steps"]): round(0.9 * 0.1 / q["coverage_error"] ** 2) for q in values["curve"]
    }
    assert rows.pop(tuple(values["chosen"].values())) == store.num_rows("val")
    assert set(rows.values()) == {40}


@pytest.mark.parametrize(("steps", "told"), [(None, 1), (3, 0)])
def test_without_validation_rows_nothing_is_chosen_and_it_is_said(tmp_path: Path, steps: int | None, told: int) -> None:
    without = make_dataset(tmp_path, val_ratio=0.0)
    train_loop(run_config(without, tmp_path / "run", {**CHOSEN, "num_inference_steps": steps}, num_epochs=1), CPU)
    line = "no validation rows: the solver and number of steps are not chosen, and not calibrated: euler x 4\n"
    assert (tmp_path / "run/train.log").read_text().count(line) == told


def test_the_loaded_model_refuses_what_was_not_validated(run_dir: Path) -> None:
    model = load_checkpoint(run_dir).model
    states = torch.zeros(2, 2), torch.zeros(2, 2)
    model.sample(*states)
    model.sample(*states, solver="euler", num_inference_steps=4)
    with pytest.raises(ConfigError, match=r"got euler x 7, validated: angular_adams x 2, .*; use"):
        model.sample(*states, solver="euler", num_inference_steps=7)
    model.sample(*states, solver="euler", num_inference_steps=7, allow_unvalidated=True)


def test_a_fixed_number_of_steps_is_kept_and_validated_alone(store: TransitionStore, tmp_path: Path) -> None:
    train_loop(run_config(store, tmp_path / "run", {**FLOW, "num_inference_steps": 3}, num_epochs=1), CPU)
    model = load_checkpoint(tmp_path / "run").model
    assert isinstance(model, FlowInverseDynamics)
    assert model.validated == {SamplingSetting("euler", 3)}


def test_another_choice_is_stored(store: TransitionStore, tmp_path: Path) -> None:
    train_loop(run_config(store, tmp_path / "run", CHOSEN, num_epochs=1), CPU)
    folder = find_checkpoint(tmp_path / "run")
    chosen = load_checkpoint(folder).model.solver
    choose_steps(folder, 3)
    model = load_checkpoint(folder).model
    assert isinstance(model, FlowInverseDynamics)
    assert (model.solver, model.num_inference_steps) == (chosen, 3)
    (folder / SAMPLING_FILE).write_text('{"chosen": {"solver": "rk9", "num_inference_steps": 1}, "curve": []}')
    with pytest.raises(DataError, match=r"sampling settings do not fit the model: .*rk9"):
        load_checkpoint(folder)
