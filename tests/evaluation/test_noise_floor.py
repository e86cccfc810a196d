from __future__ import annotations

import numpy as np
import pytest

from invdyn.evaluation.noise_floor import estimate_noise_floor


def noisy_sine(noise: float, dims: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    features = generator.uniform(-2, 2, (6000, 2))
    smooth = np.sin(2 * features[:, :1]) * features[:, 1:]
    target = smooth + noise * generator.normal(size=(6000, dims))
    return features[:1000], target[:1000], features[1000:], target[1000:]


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_known_noise_is_found(noise: float) -> None:
    found = estimate_noise_floor(*noisy_sine(noise), np.array([2.0]))
    assert found.std_per_dim[0] == pytest.approx(noise, rel=0.08)
    assert found.nrmse == pytest.approx(found.std_per_dim[0] / 2)
    assert (found.num_queries, found.num_references) == (1000, 5000)


def test_without_noise_little_is_left() -> None:
    assert estimate_noise_floor(*noisy_sine(0.0), np.ones(1)).nrmse < 0.03


def test_a_constant_dimension_is_left_out() -> None:
    query, target, reference, other = noisy_sine(0.1, dims=2)
    target[:, 1] = other[:, 1] = 3.0
    found = estimate_noise_floor(query, target, reference, other, np.array([1.0, np.nan]))
    assert found.nrmse == pytest.approx(found.std_per_dim[0])
    assert found.std_per_dim[1] == 0
