from __future__ import annotations

import numpy as np
import pytest

from invdyn.doctor.findings import INFO, WARNING
from invdyn.doctor.shift import check_shift, episode_histograms, kolmogorov_smirnov, measure_shift
from invdyn.doctor.values import Names
from tests.doctor.recordings import record

NAMES = Names(("x0", "x1", "v0", "v1"), ())


def columns(states):
    return np.concatenate(states), np.repeat(np.arange(len(states)), len(states[0]))


def test_distance_of_two_known_distributions():
    # Uniform on [0, 1] against uniform on [0.25, 1.25]: the distribution functions differ by a quarter.
    low, high = np.linspace(0, 1, 4000), np.linspace(0.25, 1.25, 4000)
    values = np.concatenate([low, high])[:, None]
    counts = episode_histograms(values, np.repeat([0, 1], 4000), 2)
    assert counts.sum() == 8000
    distance = kolmogorov_smirnov(counts, np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]))
    assert distance == pytest.approx(np.array([[0.25]]), abs=0.02)


def test_random_splits_raise_no_alarm():
    states, _ = record(60)
    values, episode = columns(states)
    generator = np.random.default_rng(3)
    alarms = 0
    for _ in range(20):
        split = generator.permutation([0] * 40 + [1] * 10 + [2] * 10)
        alarms += len([f for f in check_shift(NAMES, measure_shift(values, episode, split)) if f.severity == WARNING])
    assert alarms == 0


def test_a_split_by_another_setting_raises_an_alarm():
    states, _ = record(60)
    split = np.array([0] * 40 + [1] * 10 + [2] * 10)
    moved = [s + np.array([0.0, 6.0 * (k == 1), 0.0, 0.0]) for s, k in zip(states, split, strict=True)]
    values, episode = columns(moved)
    (found,) = check_shift(NAMES, measure_shift(values, episode, split))
    assert (found.severity, found.figures["split"]) == (WARNING, "val")
    assert int(np.argmax(found.figures["ks"])) == 1
    assert found.figures["mean_difference"][1] > 0.5
    assert "x1 (KS" in found.evidence


def test_one_episode_is_too_few_to_blame():
    states, _ = record(10)
    values, episode = columns(states)
    findings = check_shift(NAMES, measure_shift(values, episode, np.array([1] + [0] * 9)))
    assert all(f.severity == INFO for f in findings)


def test_nothing_to_compare():
    states, _ = record(3)
    values, episode = columns(states)
    assert measure_shift(values, episode, np.zeros(3, int)) == []
