"""The closed forms against rejection sampling: uniform actions, kept where their force is the one asked for."""

from __future__ import annotations

import numpy as np
import pytest

from invdyn.envs.actuation import ACTUATIONS, FORCE_TOLERANCE, MAX_FORCE, Actuation

FORCES = [-2.8, -1.7, -0.3, 0.2, 1.1, 2.6]
every_actuation = pytest.mark.parametrize("name", ACTUATIONS)


def uniform_actions(actuation: Actuation, count: int, seed: int = 0) -> np.ndarray:
    low, high = np.array(actuation.low), np.array(actuation.high)
    return np.random.default_rng(seed).uniform(low, high, (count, len(low)))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov's: the largest difference of the two distribution functions."""
    points = np.sort(np.concatenate([one, other]))
    functions = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (one, other)]
    return float(np.abs(functions[0] - functions[1]).max())


@every_actuation
def test_samples_have_their_force_and_lie_in_bounds(name: str) -> None:
    actuation = ACTUATIONS[name]
    force = actuation.force(uniform_actions(actuation, 2000))
    first = actuation.sample_first(force, 5, np.random.default_rng(1))
    action = actuation.complete(first, force)
    assert action.shape == (5, 2000, len(actuation.low))
    np.testing.assert_allclose(actuation.force(action), np.broadcast_to(force, (5, 2000)), atol=1e-9)
    assert (action >= np.array(actuation.low)).all()
    assert (action <= np.array(actuation.high)).all()


@every_actuation
def test_samples_given_random_forces_are_uniform_again(name: str) -> None:
    """If p(a | force) is right, forces of uniform actions followed by it must give back uniform actions."""
    actuation = ACTUATIONS[name]
    actions = uniform_actions(actuation, 40_000)
    force = actuation.force(actions)
    drawn = actuation.complete(actuation.sample_first(force, 1, np.random.default_rng(1)), force)[0]
    for one, other in zip(actions.T, drawn.T, strict=True):
        assert distance(one, other) < 0.015  # 1.95 / sqrt(20,000): chance exceeds it once in 1,000


@pytest.mark.parametrize("force", FORCES)
@pytest.mark.parametrize("name", ["two_factor", "antagonist"])
def test_samples_of_one_force_equal_rejection(name: str, force: float) -> None:
    actuation = ACTUATIONS[name]
    candidates = uniform_actions(actuation, 2_000_000)
    kept = candidates[np.abs(actuation.force(candidates) - force) < 0.01]
    assert len(kept) > 300
    forces = np.full(20_000, force)
    drawn = actuation.complete(actuation.sample_first(forces, 1, np.random.default_rng(1)), forces)[0]
    bound = 1.95 * np.sqrt(1 / len(kept) + 1 / 20_000) + 0.01  # the window around the force blurs it a little
    for one, other in zip(kept.T, drawn.T, strict=True):
        assert distance(one, other) < bound


@pytest.mark.parametrize(
    ("force", "low", "high"), [(0.0, -0.15, 0.15), (3.0, 2 / 3, 1.0), (-3.0, -1.0, -2 / 3), (1.5, 0.4083333, 0.4083333)]
)
def test_the_dead_zone_and_saturation_are_intervals(force: float, low: float, high: float) -> None:
    actuation = ACTUATIONS["dead_zone"]
    first = actuation.sample_first(np.array([force]), 5000, np.random.default_rng(0))
    assert first.min() == pytest.approx(low, abs=1e-3)
    assert first.max() == pytest.approx(high, abs=1e-3)
    assert first.mean() == pytest.approx((low + high) / 2, abs=5e-3)
    np.testing.assert_allclose(actuation.force(np.array([[low * 0.999], [high * 1.0]])), force, atol=0.01)


@every_actuation
def test_float32_rounding_keeps_the_class_of_a_force(name: str) -> None:
    actuation = ACTUATIONS[name]
    force = np.array([0.0, MAX_FORCE, -MAX_FORCE])
    for shift in (-0.5 * FORCE_TOLERANCE, 0.5 * FORCE_TOLERANCE):
        shifted = actuation.entropy(force + shift)
        if name == "dead_zone":
            np.testing.assert_array_equal(shifted, actuation.entropy(force))
        first = actuation.sample_first(force + shift, 100, np.random.default_rng(0))
        assert np.isfinite(actuation.complete(first, force + shift)).all()


@pytest.mark.parametrize("force", FORCES)
@pytest.mark.parametrize("name", ["two_factor", "antagonist"])
def test_densities_integrate_to_one_and_give_the_entropy(name: str, force: float) -> None:
    actuation = ACTUATIONS[name]
    grid = np.linspace(actuation.low[0], actuation.high[0], 400_001)
    density = np.exp(actuation.log_density(np.array([force]), grid[:, None])[:, 0])
    cell = grid[1] - grid[0]
    assert density.sum() * cell == pytest.approx(1.0, abs=2e-4)
    safe = np.where(density > 0, density, 1.0)
    assert -(density * np.log(safe)).sum() * cell == pytest.approx(actuation.entropy(np.array([force]))[0], abs=2e-3)


def test_entropy_of_intervals_and_points() -> None:
    entropy = ACTUATIONS["dead_zone"].entropy(np.array([0.0, 3.0, -3.0, 1.0]))
    np.testing.assert_allclose(entropy, np.log([0.3, 1 / 3, 1 / 3, 0.0 + 1e-300]) * [1, 1, 1, np.inf])
    density = ACTUATIONS["dead_zone"].log_density(np.array([0.0, 1.0, 1.0]), np.array([0.2, 0.0, 0.3222222222]))
    assert density.tolist() == [-np.inf, -np.inf, np.inf]
