"""Policies that explore: they ignore the state, so whole sequences of actions can be drawn ahead."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Float64

from invdyn.envs.collect_config import (
    ActionRangeConfig,
    OrnsteinUhlenbeckPolicyConfig,
    PolicyConfig,
    SinusoidPolicyConfig,
    UniformPolicyConfig,
)
from invdyn.errors import ConfigError


class Policy(Protocol):
    """The actions of one episode."""

    def draw(self, num_steps: int) -> Float32[np.ndarray, "num_steps action_dim"]:
        """Draw the next actions; drawing 3 and then 4 gives the same as drawing 7."""
        ...


def start_policy(
    config: PolicyConfig,
    generator: np.random.Generator,
    low: Float32[np.ndarray, " action_dim"],
    high: Float32[np.ndarray, " action_dim"],
) -> Policy:
    """Start a policy for one episode, acting in [low, high]."""
    if isinstance(config, UniformPolicyConfig):
        return _Uniform(generator, low, high)
    if isinstance(config, OrnsteinUhlenbeckPolicyConfig):
        return _OrnsteinUhlenbeck(config, generator, low, high)
    return _Sinusoid(config, generator, low, high)


def action_range(
    config: ActionRangeConfig, low: Float32[np.ndarray, " action_dim"], high: Float32[np.ndarray, " action_dim"]
) -> tuple[Float32[np.ndarray, " action_dim"], Float32[np.ndarray, " action_dim"]]:
    """Return the range a policy acts in: what the config says, else the given range.

    Raises:
        ConfigError: when the config's bounds have the wrong length, or the range is empty or unbounded.
    """
    low = _bound("policy.low", config.low, low)
    high = _bound("policy.high", config.high, high)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ConfigError("the action range must be bounded; the task's is not: give policy.low and policy.high")
    if not (low <= high).all():
        raise ConfigError(f"policy.low must not be above policy.high, got {low.tolist()} and {high.tolist()}")
    return low, high


def _bound(name: str, given: float | tuple[float, ...] | None, default: np.ndarray) -> np.ndarray:
    if given is None:
        return default
    values = np.asarray(given, np.float32)
    if values.shape not in ((), default.shape):
        raise ConfigError(f"{name} must be one number or {len(default)} numbers, got {values.size}")
    return np.broadcast_to(values, default.shape).copy()


class _Scaled:
    """Map [-1, 1] to the action range, clip, and round to float32."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self._low, self._high = low, high
        self._middle = (low.astype(np.float64) + high) / 2.0
        self._half = (high.astype(np.float64) - low) / 2.0

    def _actions(
        self, values: Float64[np.ndarray, "num_steps action_dim"]
    ) -> Float32[np.ndarray, "num_steps action_dim"]:
        scaled: np.ndarray = (self._middle + self._half * values).astype(np.float32)
        return scaled.clip(self._low, self._high)


class _Uniform(_Scaled):
    def __init__(self, generator: np.random.Generator, low: np.ndarray, high: np.ndarray) -> None:
        super().__init__(low, high)
        self._generator = generator

    def draw(self, num_steps: int) -> Float32[np.ndarray, "num_steps action_dim"]:
        return self._actions(2.0 * self._generator.random((num_steps, len(self._low))) - 1.0)


class _OrnsteinUhlenbeck(_Scaled):
    """x' = e^(-1/n) x + std sqrt(1 - e^(-2/n)) xi: the exact discretisation, stationary from the first step."""

    def __init__(
        self,
        config: OrnsteinUhlenbeckPolicyConfig,
        generator: np.random.Generator,
        low: np.ndarray,
        high: np.ndarray,
    ) -> None:
        super().__init__(low, high)
        self._generator = generator
        self._decay = math.exp(-1.0 / config.correlation_steps)
        self._kick = config.std * math.sqrt(1.0 - self._decay**2)
        self._values = (config.std * generator.standard_normal(len(low))).tolist()

    def draw(self, num_steps: int) -> Float32[np.ndarray, "num_steps action_dim"]:
        kicks = self._kick * self._generator.standard_normal((num_steps, len(self._low)))
        columns = [self._follow(dimension, column) for dimension, column in enumerate(kicks.T.tolist())]
        return self._actions(np.array(columns).T.reshape(num_steps, len(self._low)))

    def _follow(self, dimension: int, kicks: list[float]) -> list[float]:
        # Plain floats: numpy costs ten times as much per step here, and a matrix product would depend on the BLAS.
        decay, value, path = self._decay, self._values[dimension], []
        for kick in kicks:
            path.append(value)
            value = decay * value + kick
        self._values[dimension] = value
        return path


class _Sinusoid(_Scaled):
    def __init__(
        self, config: SinusoidPolicyConfig, generator: np.random.Generator, low: np.ndarray, high: np.ndarray
    ) -> None:
        super().__init__(low, high)
        size = len(low)
        self._generator, self._noise, self._step = generator, config.noise, 0
        self._amplitude = generator.uniform(*config.amplitude, size)
        shortest, longest = (math.log(value) for value in config.period_steps)
        self._frequency = 2.0 * math.pi / np.exp(generator.uniform(shortest, longest, size))
        self._phase = generator.uniform(0.0, 2.0 * math.pi, size)

    def draw(self, num_steps: int) -> Float32[np.ndarray, "num_steps action_dim"]:
        steps = np.arange(self._step, self._step + num_steps, dtype=np.float64)[:, None]
        self._step += num_steps
        noise = self._noise * self._generator.standard_normal((num_steps, len(self._low)))
        return self._actions(self._amplitude * np.sin(self._frequency * steps + self._phase) + noise)
