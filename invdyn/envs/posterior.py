"""The exact p(action | state, next_state) of the tasks whose actions are many-valued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from invdyn.envs.actuation import FORCE_TOLERANCE
from invdyn.envs.inverse import PhysicalInverse
from invdyn.envs.pendulum import InvertedPendulumManyValuedEnv
from invdyn.envs.registration import TWO_FACTOR_PENDULUM_ID
from invdyn.envs.replay import check_rows
from invdyn.envs.task import make_env, wrapper_offset
from invdyn.errors import ConfigError, DataError

_BOUND_TOLERANCE = 1e-6


class ActionPosterior:
    """The actions that could have taken a state to the next state, with their exact probabilities.

    The physical inverse gives the motor's force; the actions of that force are known in closed form
    (`invdyn.envs.actuation`). Exact for recordings under the uniform policy over the whole action range, whose actions
    depend on nothing else, inside the joint limits.

    Attributes:
        state_dim: length of a state [qpos, qvel].
        action_dim: length of an action.

    Example:
        >>> posterior = ActionPosterior("InvertedPendulumAntagonist-v5")
        >>> actions = posterior.sample(np.zeros((1, 4)), np.zeros((1, 4)), 5, np.random.default_rng(0))
        >>> actions.shape, bool(np.allclose(actions[..., 0], actions[..., 1]))  # no force: both pull alike
        ((5, 1, 2), True)
    """

    def __init__(self, env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> None:
        """Make the task's physical inverse.

        Raises:
            ConfigError: when the task is not one of those, or something shifts its actions.
        """
        env = make_env(env_id, env_kwargs)
        base, shift = env.unwrapped, wrapper_offset(env)
        env.close()
        if not isinstance(base, InvertedPendulumManyValuedEnv):
            raise ConfigError(
                f"the exact posterior needs a task with an actuation, such as {TWO_FACTOR_PENDULUM_ID}; got {env_id}"
            )
        if shift is None or np.any(shift) or np.any(base.action_offset):
            raise ConfigError(f"the exact posterior needs actions that nothing shifts, {env_id} has an action offset")
        self._actuation = base.actuation
        self._inverse = PhysicalInverse(env_id, env_kwargs, of_controls=True)
        self.state_dim, self.action_dim = self._inverse.state_dim, len(self._actuation.low)

    def force(
        self, state: Float[np.ndarray, "rows state_dim"], next_state: Float[np.ndarray, "rows state_dim"]
    ) -> Float64[np.ndarray, " rows"]:
        """Return the motor's force of each transition, in units of its command.

        Raises:
            DataError: when shapes do not fit the task, or a value is not finite.
        """
        return self._inverse(state, next_state)[:, 0]

    def force_of(self, action: Float[np.ndarray, "*batch action_dim"]) -> Float64[np.ndarray, "*batch"]:
        """Return the motor's force of actions, in units of its command.

        Raises:
            DataError: when the last axis is not an action.
        """
        if action.shape[-1:] != (self.action_dim,):
            raise DataError(f"action must have shape (..., {self.action_dim}) for this task, got {action.shape}")
        return self._actuation.force(action)

    def sample(
        self,
        state: Float[np.ndarray, "rows state_dim"],
        next_state: Float[np.ndarray, "rows state_dim"],
        num_samples: int,
        generator: np.random.Generator,
    ) -> Float64[np.ndarray, "samples rows action_dim"]:
        """Draw actions of each transition, (num_samples, rows, action_dim) float64.

        Raises:
            ConfigError: when `num_samples` is below 1.
            DataError: when shapes do not fit the task, or a value is not finite.
        """
        if num_samples < 1:
            raise ConfigError(f"num_samples must be 1 or more, got {num_samples}")
        force = self.force(state, next_state)
        first = self._actuation.sample_first(force, num_samples, generator)
        return self._actuation.complete(first, force)

    def log_prob(
        self,
        state: Float[np.ndarray, "rows state_dim"],
        action: Float[np.ndarray, "rows action_dim"],
        next_state: Float[np.ndarray, "rows state_dim"],
    ) -> Float64[np.ndarray, " rows"]:
        """Return the log density, in nats, of the first number of the action: with the force it determines the rest.

        An action is a point on a curve, so it has no density per area. -inf for actions of another force or out of
        bounds; inf where only one action is right.

        Raises:
            DataError: when shapes do not fit the task, or a value is not finite.
        """
        values = np.asarray(action, np.float64)
        check_rows("action", values, self.action_dim)
        force = self.force(state, next_state)
        if len(values) != len(force):
            raise DataError(f"action must have as many rows as state, got {len(values)} and {len(force)}")
        low, high = (np.asarray(bound) for bound in (self._actuation.low, self._actuation.high))
        possible = ((values >= low - _BOUND_TOLERANCE) & (values <= high + _BOUND_TOLERANCE)).all(axis=1)
        possible &= np.abs(self.force_of(values) - force) <= FORCE_TOLERANCE
        return np.where(possible, self._actuation.log_density(force, values[:, 0]), -np.inf)

    def entropy(
        self, state: Float[np.ndarray, "rows state_dim"], next_state: Float[np.ndarray, "rows state_dim"]
    ) -> Float64[np.ndarray, " rows"]:
        """Return the differential entropy, in nats, of the first number of the action; -inf where one action is right.

        Raises:
            DataError: when shapes do not fit the task, or a value is not finite.
        """
        return self._actuation.entropy(self.force(state, next_state))


def has_posterior(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Return whether a task has several right actions with an exact posterior.

    Raises:
        ConfigError: when the task cannot be made.
    """
    env = make_env(env_id, env_kwargs)
    env.close()
    return isinstance(env.unwrapped, InvertedPendulumManyValuedEnv)
