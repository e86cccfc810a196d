from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from gymnasium.spaces import Box

from invdyn.envs.posterior import ActionPosterior
from invdyn.envs.replay import SimulatorReplay
from invdyn.envs.task import make_env
from invdyn.evaluation.calibration import (
    calibration_error,
    central_levels,
    coverage,
    density_levels,
    interval_widths,
)

ROWS, SAMPLES = 4000, 64
LEVELS = (0.5, 0.9)
MANY_VALUED = ("TwoFactor", "Antagonist", "DeadZone")


def four_errors(level: float, rows: int = ROWS) -> float:
    return 4 * math.sqrt(level * (1 - level) / rows)


def assert_nominal(levels: np.ndarray, rows: int = ROWS) -> None:
    for level, held in zip(LEVELS, coverage(levels, LEVELS), strict=True):
        assert held == pytest.approx(level, abs=four_errors(level, rows))


@pytest.mark.parametrize("num_samples", [2, 8, 64])
@pytest.mark.parametrize("dims", [1, 3])
def test_regions_of_the_true_distribution_hold_what_they_say(num_samples: int, dims: int) -> None:
    """For any number of samples, skewed and correlated as the distribution may be."""
    generator = np.random.default_rng(0)
    draws = np.exp(generator.normal(size=(num_samples + 1, ROWS, dims))).cumsum(axis=2)
    assert_nominal(density_levels(draws[1:], draws[0], np.ones(dims), generator))
    for dim in range(dims):
        assert_nominal(central_levels(draws[1:], draws[0], np.ones(dims), generator)[:, dim])


@pytest.mark.parametrize("task", MANY_VALUED)
def test_regions_of_the_exact_posterior_hold_what_they_say(task: str) -> None:
    """Two branches, a segment, intervals and points: real transitions of the simulator."""
    env_id = f"InvertedPendulum{task}-v5"
    generator = np.random.default_rng(1)
    posterior, rows = ActionPosterior(env_id), 1500
    state = generator.uniform(-0.3, 0.3, (rows, 4))
    bounds = make_env(env_id).action_space
    assert isinstance(bounds, Box)
    action = generator.uniform(bounds.low, bounds.high, (rows, posterior.action_dim))
    samples = posterior.sample(state, SimulatorReplay(env_id)(state, action), SAMPLES, generator)
    assert_nominal(density_levels(samples, action, np.ones(posterior.action_dim), generator), rows)
    for dim in range(posterior.action_dim):
        assert_nominal(central_levels(samples, action, np.ones(posterior.action_dim), generator)[:, dim], rows)


def test_one_branch_of_two_holds_half() -> None:
    generator = np.random.default_rng(2)
    sign = np.where(generator.random((ROWS, 1)) < 0.5, 1.0, -1.0)
    truth = sign * (1 + 0.1 * generator.normal(size=(ROWS, 1)))
    samples = 1 + 0.1 * generator.normal(size=(SAMPLES, ROWS, 1))
    held = coverage(density_levels(samples, truth, np.ones(1), generator), LEVELS)
    np.testing.assert_allclose(held, [0.25, 0.45], atol=0.04)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.5])
def test_too_narrow_and_too_wide_gaussians_hold_what_can_be_computed(scale: float) -> None:
    """The region |a| < z scale of N(0, scale²) holds 2 Phi(z scale) - 1 of N(0, 1)."""
    generator = np.random.default_rng(3)
    samples = scale * generator.normal(size=(128, 1500, 1))
    truth = generator.normal(size=(1500, 1))
    normal = NormalDist()
    expected = [2 * normal.cdf(normal.inv_cdf((1 + level) / 2) * scale) - 1 for level in LEVELS]
    central = coverage(central_levels(samples, truth, np.ones(1), generator), LEVELS)
    region = coverage(density_levels(samples, truth, np.ones(1), generator), LEVELS)
    np.testing.assert_allclose(central, expected, atol=0.05)
    np.testing.assert_allclose(region, expected, atol=0.06)


def test_a_shifted_distribution_is_noticed() -> None:
    generator = np.random.default_rng(4)
    samples = generator.normal(size=(SAMPLES, ROWS, 2)) + np.array([0.0, 2.0])
    truth = generator.normal(size=(ROWS, 2))
    assert coverage(density_levels(samples, truth, np.ones(2), generator), (0.9,))[0] < 0.5
    central = central_levels(samples, truth, np.ones(2), generator)
    assert coverage(central[:, 1], (0.9,))[0] < 0.5
    assert_nominal(central[:, 0])


def test_one_action_for_all_samples_holds_nothing_but_itself() -> None:
    generator = np.random.default_rng(5)
    truth = generator.normal(size=(ROWS, 2))
    point = np.broadcast_to(truth + 0.1, (8, ROWS, 2))
    assert coverage(density_levels(point, truth, np.ones(2), generator), (0.85,))[0] == 0
    same = np.broadcast_to(truth, (8, ROWS, 2))
    assert_nominal(density_levels(same, truth, np.ones(2), generator))


def test_a_constant_dimension_is_left_out() -> None:
    generator = np.random.default_rng(6)
    draws = generator.normal(size=(SAMPLES + 1, ROWS, 2))
    draws[0, :, 1] = 1e6
    assert_nominal(density_levels(draws[1:], draws[0], np.array([1.0, np.nan]), generator))


def test_rows_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(7).normal(size=(9, 50, 2))
    whole = density_levels(draws[1:], draws[0], np.ones(2), np.random.default_rng(0))
    monkeypatch.setattr("invdyn.evaluation.calibration.CHUNK_VALUES", 9 * 9 * 7)
    np.testing.assert_array_equal(density_levels(draws[1:], draws[0], np.ones(2), np.random.default_rng(0)), whole)


def test_the_width_of_a_gaussian_interval() -> None:
    samples = np.random.default_rng(8).normal(size=(2000, 50, 2)) * np.array([1.0, 3.0])
    expected = 2 * NormalDist().inv_cdf(0.95) * np.array([1.0, 3.0])
    np.testing.assert_allclose(interval_widths(samples, 0.9), expected, rtol=0.02)


def test_the_error_of_a_curve() -> None:
    assert calibration_error(np.array([0.5, 0.9]), LEVELS) == 0
    assert calibration_error(np.array([0.3, 0.8]), LEVELS) == pytest.approx(0.15)
