from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invdyn.config import validate
from invdyn.envs.collect_config import (
    ActionRangeConfig,
    CollectConfig,
    OrnsteinUhlenbeckPolicyConfig,
    PolicyConfig,
    SinusoidPolicyConfig,
    UniformPolicyConfig,
)
from invdyn.envs.policies import action_range, start_policy
from invdyn.errors import ConfigError

LOW, HIGH = np.array([-3.0, 0.0], np.float32), np.array([1.0, 0.4], np.float32)
POLICIES = (UniformPolicyConfig(), OrnsteinUhlenbeckPolicyConfig(), SinusoidPolicyConfig())


def draw(config: PolicyConfig, *sizes: int, seed: int = 0) -> np.ndarray:
    policy = start_policy(config, np.random.default_rng(seed), LOW, HIGH)
    return np.concatenate([policy.draw(size) for size in sizes])


@pytest.mark.parametrize("config", POLICIES, ids=lambda config: config.name)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_pieces_do_not_matter(config: PolicyConfig, sizes: list[int]) -> None:
    assert np.array_equal(draw(config, *sizes), draw(config, sum(sizes)))


@pytest.mark.parametrize("config", POLICIES, ids=lambda config: config.name)
def test_actions_are_float32_and_fill_the_range(config: PolicyConfig) -> None:
    actions = np.concatenate([draw(config, 200, seed=seed) for seed in range(20)])
    assert actions.dtype == np.float32
    assert actions.shape == (4000, 2)
    assert (actions >= LOW).all()
    assert (actions <= HIGH).all()
    assert (np.ptp(actions, axis=0) > 0.8 * (HIGH - LOW)).all()


def test_uniform_moments() -> None:
    actions = draw(UniformPolicyConfig(), 20_000)
    np.testing.assert_allclose(actions.mean(axis=0), (LOW + HIGH) / 2, atol=0.03)
    np.testing.assert_allclose(actions.std(axis=0), (HIGH - LOW) / np.sqrt(12), rtol=0.03)


def test_ornstein_uhlenbeck_correlation() -> None:
    config = OrnsteinUhlenbeckPolicyConfig(std=0.2, correlation_steps=5.0)
    values = (draw(config, 100_000)[:, 0] + 1.0) / 2.0
    assert values.std() == pytest.approx(0.2, rel=0.03)
    for lag in (1, 5, 10):
        correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
        assert correlation == pytest.approx(np.exp(-lag / 5.0), abs=0.03)


def test_ornstein_uhlenbeck_is_stationary_from_the_start() -> None:
    config = OrnsteinUhlenbeckPolicyConfig(std=0.2, correlation_steps=50.0)
    first = np.array([draw(config, 1, seed=seed)[0, 0] for seed in range(2000)])
    assert ((first + 1.0) / 2.0).std() == pytest.approx(0.2, rel=0.06)


def test_sinusoid_without_noise_is_one() -> None:
    config = SinusoidPolicyConfig(amplitude=(0.5, 0.5), period_steps=(20.0, 20.0), noise=0.0)
    values = (draw(config, 60)[:, 0] + 1.0) / 2.0
    np.testing.assert_allclose(values[:-20], values[20:], atol=1e-6)
    assert np.abs(np.fft.rfft(values[:40])).argmax() == 2
    assert np.abs(values).max() == pytest.approx(0.5, abs=0.01)


def test_given_bounds_replace_the_task_s() -> None:
    low, high = action_range(ActionRangeConfig(low=-1.0, high=(0.5, 0.25)), LOW, HIGH)
    assert low.tolist() == [-1.0, -1.0]
    assert high.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("config", "low", "message"),
    [
        (ActionRangeConfig(low=(1.0, 2.0, 3.0)), LOW, "policy.low must be one number or 2 numbers, got 3"),
        (ActionRangeConfig(low=2.0), LOW, r"policy.low must not be above policy.high, got \[2.0, 2.0\]"),
        (ActionRangeConfig(), -np.inf * np.ones(2, np.float32), "give policy.low and policy.high"),
    ],
)
def test_bad_ranges(config: ActionRangeConfig, low: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        action_range(config, low, HIGH)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"name": "uniforn"}, "collect: policy: .*'uniform', 'ornstein_uhlenbeck', 'sinusoid'"),
        ({"name": "uniform", "hihg": 1.0}, "unknown key 'policy.uniform.hihg'; did you mean 'high'"),
        ({"name": "sinusoid", "period_steps": [5, 2]}, r"period_steps must be \[low, high\]"),
        ({"name": "ornstein_uhlenbeck", "std": -1}, "std: .*greater than 0"),
    ],
)
def test_bad_policies_in_a_file(policy: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(CollectConfig, {"env_id": "x", "policy": policy}, where="collect")
