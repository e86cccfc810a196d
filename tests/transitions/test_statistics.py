from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invdyn.statistics import Moments, merge_moments, transition_features


def assert_equal_to_numpy(moments: Moments, rows: np.ndarray, tolerance: float = 1e-12) -> None:
    exact = rows.astype(np.longdouble)
    mean = exact.mean(axis=0)
    comoment = (exact - mean).T @ (exact - mean)
    scale = np.sqrt(np.diag(comoment)).astype(float) + 1e-300
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, mean.astype(float), rtol=1e-15, atol=tolerance * np.abs(rows).max())
    errors = (moments.comoment - comoment.astype(float)) / np.outer(scale, scale)
    assert np.abs(errors).max() < tolerance
    np.testing.assert_array_equal(moments.minimum, rows.min(axis=0))
    np.testing.assert_array_equal(moments.maximum, rows.max(axis=0))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 1.0, -50.0]),
    seed=st.integers(0, 999),
)
def test_merged_moments_equal_numpy_over_all_rows(sizes: list[int], offset: float, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(offset, size=(sum(sizes) + 1, 4)) * [1, 1e-3, 1e4, 1]
    parts = np.split(rows, np.cumsum(sizes))
    merged = merge_moments(Moments.of_rows(part) for part in parts)
    assert_equal_to_numpy(merged, rows)
    np.testing.assert_allclose(merged.std, rows.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-9 * rows.std() ** 2)


@pytest.mark.parametrize(("horizon", "history", "offset"), [((), 0, 0.0), ((2,), 1, 0.0), ((), 0, 1e4)])
def test_moments_of_transitions_over_many_chunks(horizon: tuple[int, ...], history: int, offset: float) -> None:
    generator = np.random.default_rng(0)
    num_rows = 20_000
    state = generator.normal(offset, size=(num_rows, 2 * (history + 1))).astype(np.float32)
    next_state = (state[:, -2:] + 1e-3 * generator.normal(size=(num_rows, 2))).astype(np.float32)
    action = generator.normal(size=(num_rows, *horizon, 2)).astype(np.float32)
    rows = np.concatenate([transition_features(state, next_state), action.reshape(num_rows, -1)], axis=1)
    cuts = [0, 1, 7000, 7001, 19_000, num_rows]
    parts = [slice(first, stop) for first, stop in pairwise(cuts)]
    merged = merge_moments(Moments.of_transitions(state[part], action[part], next_state[part]) for part in parts)
    assert_equal_to_numpy(merged, rows)


def test_the_same_parts_give_the_same_bits_through_json() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3))
    parts = [Moments.of_rows(part) for part in np.split(rows, [4, 11, 12])]
    travelled = [Moments.from_json(json.loads(json.dumps(part.to_json()))) for part in parts]
    assert merge_moments(travelled).to_json() == merge_moments(parts).to_json()
