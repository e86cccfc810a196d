"""Scores, calibration and likelihood of models whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from typing_extensions import override

from invdyn.errors import ConfigError
from invdyn.evaluation.distribution import calibrate, likelihood, score
from invdyn.evaluation.intervals import EpisodeBootstrap
from invdyn.models.linear import LinearInverse

ROWS = 3000
STD = np.array([2.0, 0.5])


class Gaussian(LinearInverse):
    """N(0, diag(2, .5)²) whatever the transition; the first `impossible` rows get no density."""

    impossible = 0

    @override
    def log_prob(self, state: torch.Tensor, action: torch.Tensor, next_state: torch.Tensor) -> torch.Tensor:
        found = torch.distributions.Normal(0.0, torch.from_numpy(STD)).log_prob(action.double()).sum(dim=1)
        found[: self.impossible] = -math.inf
        return found


class NoDensity(LinearInverse):
    @override
    def log_prob(self, state: torch.Tensor, action: torch.Tensor, next_state: torch.Tensor) -> torch.Tensor:
        raise ConfigError("log_prob needs a model with a density")


@pytest.fixture
def truth() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, 2)) * STD


@pytest.fixture
def bootstrap() -> EpisodeBootstrap:
    return EpisodeBootstrap(np.arange(ROWS) // 10)


def columns(truth: np.ndarray) -> dict[str, np.ndarray]:
    state = np.zeros((ROWS, 3), np.float32)
    return {"state": state, "action": truth.astype(np.float32), "next_state": state}


def test_the_likelihood_of_a_gaussian_is_its_entropy(truth: np.ndarray, bootstrap: EpisodeBootstrap) -> None:
    found, _ = likelihood(Gaussian(3, 2), columns(truth), STD, bootstrap)
    assert found is not None
    entropy = math.log(2 * math.pi * math.e) + math.log(STD.prod())
    assert found.nats == pytest.approx(entropy, abs=0.08)
    assert found.nats_per_dim == pytest.approx(found.nats / 2)
    assert found.nats_per_dim_of_std == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.04)
    assert found.interval is not None
    assert found.interval.low < found.nats < found.interval.high
    assert found.impossible == 0


def test_impossible_actions_are_counted(truth: np.ndarray, bootstrap: EpisodeBootstrap) -> None:
    model = Gaussian(3, 2)
    model.impossible = 30
    found, _ = likelihood(model, columns(truth), STD, bootstrap)
    assert found is not None
    assert (found.nats, found.impossible, found.interval) == (math.inf, 0.01, None)


def test_a_model_without_a_density_has_a_reason(truth: np.ndarray, bootstrap: EpisodeBootstrap) -> None:
    found = likelihood(NoDensity(3, 2), columns(truth), STD, bootstrap)
    assert found == (None, "log_prob needs a model with a density")


def test_scores_of_the_true_gaussian(truth: np.ndarray, bootstrap: EpisodeBootstrap) -> None:
    """E|X - a| - E|X - X'| / 2 of N(0, s²) is s / sqrt(pi); in two dimensions E|X - X'| = sqrt(pi), half of it left."""
    samples = np.random.default_rng(1).normal(size=(8, ROWS, 2)) * STD
    found = score(samples, truth, STD, bootstrap)
    np.testing.assert_allclose(found.crps_per_dim, STD / math.sqrt(math.pi), rtol=0.05)
    assert found.crps == pytest.approx(1 / math.sqrt(math.pi), rel=0.04)
    assert found.energy_score == pytest.approx(math.sqrt(math.pi) / 2, rel=0.04)
    assert found.energy_score_interval is not None
    assert found.energy_score_interval.low < found.energy_score < found.energy_score_interval.high


def test_calibration_of_the_true_gaussian(truth: np.ndarray, bootstrap: EpisodeBootstrap) -> None:
    samples = np.random.default_rng(1).normal(size=(64, ROWS, 2)) * STD
    found = calibrate(samples, truth, STD, bootstrap)
    assert (found.coverage_50, found.coverage_90) == pytest.approx((0.5, 0.9), abs=0.04)
    assert found.coverage_90 == pytest.approx(found.region[found.nominal.index(0.9)])
    assert found.error < 0.03
    assert found.width_90 == pytest.approx(2 * 1.645, rel=0.05)
    np.testing.assert_allclose(found.width_90_per_dim, 2 * 1.645 * STD, rtol=0.05)
    np.testing.assert_allclose(found.central_50_per_dim, 0.5, atol=0.04)
    assert (found.num_rows, found.num_samples) == (ROWS, 64)


def test_a_constant_dimension_is_left_out(truth: np.ndarray, bootstrap: EpisodeBootstrap) -> None:
    samples = np.random.default_rng(1).normal(size=(64, ROWS, 2)) * STD
    truth[:, 1] = 1e6
    std = np.array([2.0, np.nan])
    assert score(samples, truth, std, bootstrap).crps == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)
    found = calibrate(samples, truth, std, bootstrap)
    assert found.coverage_90 == pytest.approx(0.9, abs=0.04)
    assert found.central[-1] == pytest.approx(0.95, abs=0.03)


def test_samples_that_are_not_finite_hold_nothing(truth: np.ndarray, bootstrap: EpisodeBootstrap) -> None:
    found = calibrate(np.full((8, ROWS, 2), np.nan), truth, STD, bootstrap)
    assert found.coverage_90 == found.central[-1] == 0
