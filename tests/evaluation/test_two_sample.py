from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from invdyn.errors import DataError
from invdyn.evaluation.two_sample import classifier_two_sample

PAIRS = 4000


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
def test_shifted_gaussians_are_told_apart_as_often_as_bayes_can(distance: float) -> None:
    """Two unit Gaussians a distance d apart: no classifier is right more often than Phi(d / 2), equal ones half."""
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, PAIRS, 3))
    second[:, 0] += distance
    found = classifier_two_sample(first * 7.0 + 3.0, second * 7.0 + 3.0)
    best = NormalDist().cdf(distance / 2)
    assert found.standard_error == pytest.approx(0.5 / np.sqrt(2 * PAIRS))
    assert best - 0.04 < found.accuracy < best + 4 * found.standard_error


def test_a_difference_that_only_the_pair_shows_is_found() -> None:
    """Both columns have the same distribution; only together with the first does the second tell."""
    generator = np.random.default_rng(1)
    context, noise = generator.normal(size=(2, PAIRS, 1))
    found = classifier_two_sample(np.hstack([context, context]), np.hstack([context, noise]))
    assert found.accuracy > 0.9


def test_the_pair_of_a_row_does_not_leak() -> None:
    """The same transition stands in both sets: a classifier that remembers it would score below a half."""
    generator = np.random.default_rng(2)
    context = generator.normal(size=(200, 30))
    first, second = (np.hstack([context, generator.normal(size=(200, 1))]) for _ in range(2))
    found = classifier_two_sample(first, second)
    assert abs(found.accuracy - 0.5) < 4 * found.standard_error


def test_it_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invdyn.evaluation.two_sample.STEPS", 20)
    first, second = np.random.default_rng(3).normal(size=(2, 100, 2))
    torch.manual_seed(1)
    one = classifier_two_sample(first, second, seed=5)
    torch.manual_seed(2)
    assert classifier_two_sample(first, second, seed=5) == one
    assert classifier_two_sample(first, second, seed=6) != one


def test_equal_points_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invdyn.evaluation.two_sample.STEPS", 20)
    first = np.ones((100, 2))
    assert classifier_two_sample(first, first.copy()).accuracy == 0.5


def test_bad_sets_are_refused() -> None:
    with pytest.raises(DataError, match="50 rows or more"):
        classifier_two_sample(np.ones((49, 2)), np.ones((49, 2)))
    with pytest.raises(DataError, match="same shape"):
        classifier_two_sample(np.ones((60, 2)), np.ones((61, 2)))
    with pytest.raises(DataError, match="finite"):
        classifier_two_sample(np.full((60, 2), np.nan), np.ones((60, 2)))
