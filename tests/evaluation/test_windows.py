"""Windows on genuine recordings, from the files to the evaluation: Push-T needs history, the G1 needs a gap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdyn.config import load_config
from invdyn.evaluation.evaluate import evaluate, linear_baseline
from invdyn.models.base import InverseDynamics
from invdyn.models.linear import LinearInverse
from invdyn.statistics import Moments
from invdyn.training.checkpoint import load_model
from invdyn.training.loop import train_loop
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.store import TransitionStore
from tests.sequences.fixtures import real_recording
from tests.training.runs import CPU, FLOW, run_config

PUSHT, G1 = "diffusion_policy/pusht_160.zarr", "lerobot_v21"
PUSHT_HELD_OUT = 140
"""The last 20 of the 160 episodes are held out."""
G1_HELD_OUT = 3
"""So is the last of the four."""


def extract(recording: str, folder: Path, config: str, **values: Any) -> TransitionStore:
    """Extract a genuine recording as one of the repository's configs says, but for some values."""
    path = Path(__file__).resolve().parents[2] / "configs/dataset" / config
    overrides = {"buffer_path": str(real_recording(recording)), "output_path": str(folder), **values}
    return create_dataset(load_config(DatasetConfig, path).replace(**overrides), local=True)


def held_out_nmse(store: TransitionStore, first_held_out: int) -> float:
    """Mean squared error over variance of the linear inverse on the last episodes, fitted on those before."""
    rows = store.load("train")
    fitted = rows["episode"] < first_held_out
    model = LinearInverse(store.state_dim, store.action_dim, history=store.history, horizon=store.horizon)
    model.fit_normalization(Moments.of_transitions(*(rows[c][fitted] for c in ("state", "action", "next_state"))))
    given = (torch.from_numpy(rows[column][~fitted]) for column in ("state", "next_state"))
    action = rows["action"][~fitted].astype(np.float64)
    error = model.sample(*given)[0].double().numpy() - action
    return float((np.square(error).mean(axis=0) / rows["action"][fitted].astype(np.float64).var(axis=0)).mean())


def test_pusht_needs_two_past_states(tmp_path: Path) -> None:
    splits = {"val_ratio": 0.0, "test_ratio": 0.0}
    found = [
        held_out_nmse(extract(PUSHT, tmp_path / str(history), "pusht.yaml", history=history, **splits), PUSHT_HELD_OUT)
        for history in (0, 1, 2)
    ]
    assert 2e-4 < found[0] < 6e-4
    assert found[0] > 5 * found[1] > 25 * found[2]
    assert found[2] <= 5e-6


def trained(store: TransitionStore, folder: Path) -> InverseDynamics:
    """Train a small flow for a few epochs."""
    config = run_config(store, folder, FLOW, num_epochs=3, learning_rate=3e-3, batch_size=128)
    train_loop(config, CPU)
    return load_model(folder)


def test_the_g1_needs_a_gap(tmp_path: Path) -> None:
    """The linear inverse explains more of the command from the state five frames later."""
    splits = {"val_ratio": 0.0, "test_ratio": 0.0}
    one, five = (
        held_out_nmse(extract(G1, tmp_path / str(gap), "g1.yaml", gap=gap, **splits), G1_HELD_OUT) for gap in (1, 5)
    )
    assert five < 0.7 * one


def test_models_of_the_g1_are_better_with_a_gap(tmp_path: Path) -> None:
    """Trained on two episodes and evaluated on others, with postures of their own: far off, but less so."""
    nrmse: dict[int, dict[tuple[str, str], float]] = {}
    for gap in (1, 5):
        store = extract(G1, tmp_path / f"gap{gap}", "g1.yaml", gap=gap)
        models = {"flow": trained(store, tmp_path / f"run{gap}"), "linear": linear_baseline(store)}
        nrmse[gap] = {
            (split, result.model): result.one_sample.nrmse
            for split in ("val", "test")
            for result in evaluate(models, store, split=split, step_counts=(2,), num_samples=2, max_rows=300).results
        }
    assert all(nrmse[5][key] < nrmse[1][key] for key in nrmse[1])


@pytest.mark.parametrize(("horizon", "history"), [(4, 0), (3, 2)])
def test_several_actions_per_row(tmp_path: Path, horizon: int, history: int) -> None:
    """The model learns the shape of a row from the dataset; action t + i of a row is action t + i of the recording."""
    store = extract(PUSHT, tmp_path / "out", "pusht.yaml", horizon=horizon, history=history, gap=horizon)
    assert (store.horizon, store.history, store.gap) == (horizon, history, horizon)
    rows = store.load("test")
    assert rows["action"].shape == (len(rows["state"]), horizon, 2)
    assert rows["state"].shape[1] == 5 * (history + 1)
    follows = (np.diff(rows["step"]) == 1) & (np.diff(rows["episode"]) == 0)
    np.testing.assert_array_equal(rows["action"][:-1, 1:][follows], rows["action"][1:, :-1][follows])
    model = trained(store, tmp_path / "run")
    state, next_state = (torch.from_numpy(rows[column][:7]) for column in ("state", "next_state"))
    sample: Tensor = model.sample(state, next_state, num_samples=3)
    assert sample.shape == (3, 7, horizon, 2)
    results = evaluate({"flow": model, "linear": linear_baseline(store)}, store, step_counts=(2,), max_rows=200).results
    assert all(result.one_sample.nrmse < 0.3 for result in results)
