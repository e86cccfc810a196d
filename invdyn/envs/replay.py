"""Replay: where does an action lead from a state, in the simulator itself?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from invdyn.envs.task import OpenLoopSimulator, action_dim, make_env, mujoco_env, read_state, write_state
from invdyn.errors import ConfigError, DataError

_BATCH_TICKS = 32768


class SimulatorReplay:
    """Put the simulator in states, apply one action in each, and return the states that follow.

    The result has the same bits as `write_state` followed by `env.step`: frame skip, action offset and the clipping
    of controls are included. A recorded next state differs from it by the solver's tolerance where contacts or limits
    are active, because a recording keeps the solver's warm start from the step before.

    Attributes:
        state_dim: length of a state [qpos, qvel].
        action_dim: length of an action.
    """

    def __init__(self, env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> None:
        """Make the task.

        Raises:
            ConfigError: when the task cannot be made, or its state is more than positions and velocities.
        """
        self._env = make_env(env_id, env_kwargs)
        model = mujoco_env(self._env).model
        if model.na:
            raise ConfigError(f"replay needs a task without actuator states, {env_id} has {model.na}")
        self.state_dim, self.action_dim = model.nq + model.nv, action_dim(self._env)
        self._batch_size = max(1, _BATCH_TICKS // mujoco_env(self._env).frame_skip)
        self._simulator = OpenLoopSimulator.for_env(self._env)

    def __call__(
        self, state: Float[np.ndarray, "rows state_dim"], action: Float[np.ndarray, "rows action_dim"]
    ) -> Float64[np.ndarray, "rows state_dim"]:
        """Return the next states.

        Raises:
            DataError: when shapes do not fit the task, or a value is not finite.
        """
        states, actions = np.asarray(state, np.float64), np.asarray(action)
        check_rows("state", states, self.state_dim)
        check_rows("action", actions, self.action_dim)
        if len(states) != len(actions):
            raise DataError(f"state and action must have as many rows, got {len(states)} and {len(actions)}")
        chunks = [slice(start, start + self._batch_size) for start in range(0, len(states), self._batch_size)]
        results = [self._replay(states[chunk], actions[chunk]) for chunk in chunks]
        return np.concatenate(results) if results else np.empty((0, self.state_dim))

    def _replay(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        if self._simulator is not None:
            return self._simulator.step_each(states, actions)
        rows = []
        for state, action in zip(states, actions, strict=True):
            self._env.reset()
            write_state(self._env, state)
            self._env.step(action)
            rows.append(read_state(self._env))
        return np.stack(rows)


def check_rows(name: str, values: np.ndarray, size: int) -> None:
    """Check an array of rows.

    Raises:
        DataError: when `values` does not have shape (rows, size), or holds a value that is not finite.
    """
    if values.ndim != 2 or values.shape[1] != size:
        raise DataError(f"{name} must have shape (rows, {size}) for this task, got {values.shape}")
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(f"{name} must be finite, row {int(bad.argmax())} holds {values[bad.argmax()].tolist()}")
