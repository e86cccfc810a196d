from __future__ import annotations

import numpy as np
import pytest

from invdyn.evaluation.intervals import EpisodeBootstrap, over_seeds


def test_the_interval_of_independent_rows_is_that_of_the_mean() -> None:
    rows = np.random.default_rng(0).normal(5.0, 2.0, 4000)
    found = EpisodeBootstrap(np.arange(4000), replicates=2000).interval(rows)
    assert found is not None
    half = 1.96 * rows.std() / np.sqrt(4000)
    assert found.low == pytest.approx(rows.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(rows.mean() + half, abs=0.15 * half)


def test_equal_rows_of_an_episode_count_once() -> None:
    """Fifty copies of each row say no more than one: the interval is the same, not seven times as narrow."""
    rows = np.random.default_rng(1).normal(size=400)
    alone = EpisodeBootstrap(np.arange(400)).interval(rows)
    copies = EpisodeBootstrap(np.arange(400).repeat(50)).interval(rows.repeat(50))
    assert alone is not None
    assert copies is not None
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high), rel=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Episodes of 1 to 30 rows with an offset each, far from 0: how many rows were drawn counts too."""
    generator = np.random.default_rng(2)
    held, trials = 0, 300
    for trial in range(trials):
        sizes = generator.integers(1, 31, 60)
        rows = 5.0 + generator.normal(size=60).repeat(sizes) + generator.normal(size=sizes.sum())
        found = EpisodeBootstrap(np.arange(60).repeat(sizes), seed=trial, replicates=300).interval(rows)
        assert found is not None
        held += found.low < 5.0 < found.high
    assert 0.89 < held / trials < 0.99


@pytest.mark.parametrize(("episodes", "least"), [(5, 0.88), (8, 0.91), (20, 0.92)])
def test_intervals_from_few_episodes_hold_the_truth_too(episodes: int, least: float) -> None:
    rows = np.random.default_rng(4).normal(size=(1000, episodes))
    found = [EpisodeBootstrap(np.arange(episodes), seed).interval(values) for seed, values in enumerate(rows)]
    held = np.mean([interval is not None and interval.low < 0.0 < interval.high for interval in found])
    assert least < held < 0.97


def test_a_transform_is_applied_to_the_mean() -> None:
    rows = np.random.default_rng(3).normal(size=500) ** 2
    bootstrap = EpisodeBootstrap(np.arange(500))
    plain, root = bootstrap.interval(rows), bootstrap.interval(rows, np.sqrt)
    assert plain is not None
    assert root is not None
    assert (root.low, root.high) == pytest.approx((plain.low**0.5, plain.high**0.5), rel=1e-3)


def test_no_interval_without_episodes_or_finite_values() -> None:
    assert EpisodeBootstrap(np.arange(12) % 4).interval(np.arange(12.0)) is None
    assert EpisodeBootstrap(np.arange(15) % 5).interval(np.arange(15.0)) is not None
    assert EpisodeBootstrap(np.arange(10)).interval(np.full(10, np.inf)) is None


def test_one_seed_has_no_spread() -> None:
    found = over_seeds([2.0])
    assert (found.mean, found.low, found.high, found.seeds) == (2.0, 2.0, 2.0, 1)
    assert np.isnan(found.std)
