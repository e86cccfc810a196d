from __future__ import annotations

import math

import numpy as np
import pytest

from invdyn.errors import DataError
from invdyn.evaluation.metrics import (
    crps,
    energy_score,
    expected_energy_scores,
    flat_actions,
    nrmse,
    nrmse_per_dim,
    r2_per_dim,
    rmse_per_dim,
    varying_std,
)
from invdyn.statistics import Moments


@pytest.fixture
def truth() -> np.ndarray:
    return np.random.default_rng(0).normal([1.0, -2.0], [3.0, 0.1], (4000, 2))


def test_a_perfect_prediction_scores_zero_error_and_r2_one(truth: np.ndarray) -> None:
    std = truth.std(axis=0)
    assert nrmse(truth, truth, std) == 0
    assert r2_per_dim(truth, truth).tolist() == [1, 1]
    assert energy_score(np.stack([truth, truth]), truth, std) == 0


def test_the_mean_action_scores_one_and_r2_zero(truth: np.ndarray) -> None:
    mean = np.broadcast_to(truth.mean(axis=0), truth.shape)
    np.testing.assert_allclose(nrmse_per_dim(mean, truth, truth.std(axis=0)), [1, 1], rtol=1e-12)
    assert nrmse(mean, truth, truth.std(axis=0)) == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(r2_per_dim(mean, truth), [0, 0], atol=1e-12)


def test_a_known_offset_is_measured_in_units_of_std(truth: np.ndarray) -> None:
    std = np.array([2.0, 0.5])
    shifted = truth + 1.0
    np.testing.assert_allclose(nrmse_per_dim(shifted, truth, std), [0.5, 2.0])
    assert nrmse(shifted, truth, std) == pytest.approx(math.sqrt((0.25 + 4.0) / 2))


def test_a_constant_dimension_is_left_out(truth: np.ndarray) -> None:
    truth[:, 1] = 7.0
    prediction = truth + np.array([3.0, 100.0])
    std = varying_std(Moments.of_rows(truth), slice(None))
    assert np.isnan(std[1])
    assert nrmse(prediction, truth, std) == pytest.approx(nrmse(prediction[:, :1], truth[:, :1], std[:1]))
    assert np.isnan(nrmse_per_dim(prediction, truth, std)[1])
    assert np.isnan(r2_per_dim(prediction, truth)[1])
    assert energy_score(np.stack([prediction] * 2), truth, std) == pytest.approx(3.0 / std[0])


def test_rounding_noise_is_not_a_signal() -> None:
    # The same float32 number but for its last bit.
    rows = np.where(np.arange(100) % 2, np.float32(7.0), np.nextafter(np.float32(7.0), np.float32(8.0)))[:, None]
    with pytest.raises(DataError, match="must vary"):
        varying_std(Moments.of_rows(rows.astype(np.float64)), slice(None))


@pytest.mark.parametrize("num_samples", [2, 8])
def test_the_energy_score_of_the_true_gaussian_has_its_closed_form(num_samples: int) -> None:
    """E|X - a| - E|X - X'| / 2 = 1/sqrt(pi) for X, X', a ~ N(0, 1): unbiased, so for any number of samples."""
    draws = np.random.default_rng(1).normal(size=(num_samples + 1, 200_000, 1))
    score = energy_score(draws[1:], draws[0], np.ones(1))
    assert score == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)


def test_the_energy_score_of_a_point_is_its_mean_distance() -> None:
    samples = np.broadcast_to([3.0, 4.0], (4, 10, 2))
    assert energy_score(samples, np.zeros((10, 2)), np.ones(2)) == pytest.approx(5.0)
    assert energy_score(samples, np.zeros((10, 2)), np.array([3.0, 4.0])) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (3.0, 0.0), (1.0, 1.0)])
def test_the_energy_score_is_lowest_for_the_true_distribution(scale: float, shift: float) -> None:
    draws = np.random.default_rng(2).normal(size=(9, 50_000, 1))
    other = energy_score(draws[1:] * scale + shift, draws[0], np.ones(1))
    assert energy_score(draws[1:], draws[0], np.ones(1)) < other - 0.05


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 50 / 4 - 9 / 2), (0.5, 12 / 4 - 3 / 2)])
def test_the_energy_score_against_draws(exponent: float, expected: float) -> None:
    """Samples 0 and 9 of draws 25 and 9: distances of 25, 16, 9 and 0, and of 9 between the samples."""
    samples, draws = (np.array(values)[:, None, None] for values in ([0.0, 9.0], [25.0, 9.0]))
    assert expected_energy_scores(samples, draws, np.ones(1), exponent) == pytest.approx(expected)


@pytest.mark.parametrize("num_samples", [2, 3, 64])
def test_the_crps_of_a_gaussian_has_its_closed_form(num_samples: int) -> None:
    """N(0, s²) against a: s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = a / s; unbiased for any ensemble size."""
    generator, scale, action = np.random.default_rng(3), 2.0, 1.5
    samples = scale * generator.normal(size=(num_samples, 50_000, 1))
    z = action / scale
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    expected = scale * (z * math.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    assert crps(samples, np.full((50_000, 1), action)).mean() == pytest.approx(expected, abs=0.03)


def test_the_crps_of_one_dimension_is_its_energy_score(truth: np.ndarray) -> None:
    samples = np.random.default_rng(4).normal(size=(5, len(truth), 2))
    scores = crps(samples, truth).mean(axis=0)
    for dim in range(2):
        alone = energy_score(samples[..., [dim]], truth[:, [dim]], np.ones(1))
        assert scores[dim] == pytest.approx(alone, rel=1e-12)


def test_the_energy_score_in_two_dimensions_has_its_closed_form() -> None:
    """The distance of two draws of N(0, I) in the plane is sqrt(pi) in the mean; half of it is left."""
    draws = np.random.default_rng(5).normal(size=(5, 100_000, 2))
    assert energy_score(draws[1:], draws[0], np.ones(2)) == pytest.approx(math.sqrt(math.pi) / 2, abs=0.01)


def test_rmse_keeps_the_units(truth: np.ndarray) -> None:
    np.testing.assert_allclose(rmse_per_dim(truth + np.array([3.0, -0.1]), truth), [3.0, 0.1])


def test_actions_of_a_horizon_are_laid_side_by_side() -> None:
    action = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    assert flat_actions(action).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
