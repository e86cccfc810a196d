"""What float32 takes from s' - s is foretold from the statistics, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invdyn.transitions.extract import create_dataset
from invdyn.transitions.rounding import Rounding
from tests.sequences.recordings import Episode
from tests.transitions.datasets import config_of, record


def walk(offset: np.ndarray, seed: int = 0) -> list[Episode]:
    """Episodes that move by 0.01 a step about an offset, one per dimension."""
    random = np.random.default_rng(seed)
    actions = [random.normal(size=(200, 2)) for _ in range(10)]
    steps = [random.normal(size=(201, len(offset))) * 0.01 for _ in actions]
    return [(offset + np.cumsum(step, axis=0), action) for step, action in zip(steps, actions, strict=True)]


@pytest.mark.parametrize("offset", [0.0, 7.0, 1.5e3, -2e4, 1e5])
def test_the_share_is_what_is_lost(offset: float) -> None:
    states = np.concatenate([states for states, _ in walk(np.array([offset]))])
    step = np.diff(states, axis=0)
    lost = np.diff(states.astype(np.float32).astype(np.float64), axis=0) - step
    rounding = Rounding(np.sqrt(np.mean(states**2, axis=0)), step.std(axis=0))
    np.testing.assert_allclose(rounding.share, lost.std(axis=0) / step.std(axis=0), rtol=0.5 if offset == 0 else 0.1)
    assert len(rounding.lossy) == (abs(offset) > 1e4)


def test_what_does_not_move_loses_nothing() -> None:
    assert Rounding(np.array([1e6, 0.0]), np.zeros(2)).share.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "values", [{}, {"history": 2, "gap": 2}, {"horizon": 2}, {"filters": {"drop_constant_dims": True}}]
)
def test_a_dataset_tells_of_it(tmp_path: Path, values: dict[str, Any]) -> None:
    episodes = walk(np.array([0.0, 1.0, 1e5]))
    for states, _ in episodes:
        states[:, 1] = 3.0  # constant
    record(tmp_path, episodes)
    (warning,) = create_dataset(config_of(tmp_path, **values), local=True).manifest["warnings"]
    assert warning.startswith("states are stored as float32, which rounds s' - s of state [2] by up to 0.")
    assert "where values of 1e+05 move by 0.01" in warning
    assert warning.endswith(
        "subtract a constant from such a dimension before it is recorded, or leave it out where its "
        "motion does not matter"
    )
