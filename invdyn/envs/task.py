"""MuJoCo tasks: making them, their state, and running many actions at once.

The state of a task is [qpos, qvel] in float64: with the action it determines the next state, for models without
actuator state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, cast

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from jaxtyping import Float, Float32, Float64
from mujoco import rollout as mujoco_rollout

from invdyn.config import nearest
from invdyn.errors import ConfigError

FULL_PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS.value
INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION.value
_NEUTRAL_WRAPPERS = (OrderEnforcing, PassiveEnvChecker, TimeLimit)
_log = logging.getLogger(__name__)

Env = gymnasium.Env[Any, Any]
ControlMap = Callable[[Float[np.ndarray, "*batch action_dim"]], Float64[np.ndarray, "*batch num_controls"]]


def make_env(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> Env:
    """Make a MuJoCo task without a time limit.

    MuJoCo's warnings go to this module's logger from here on: by default MuJoCo writes them to a file in the
    working folder.

    Raises:
        ConfigError: when the id is unknown, the arguments do not fit, or it is not a MuJoCo task.
    """
    mujoco.set_mju_user_warning(_log.debug)
    if env_id not in gymnasium.registry:
        raise ConfigError(f"env_id must be a registered Gymnasium id, got {env_id!r}; {_nearest_id(env_id)}")
    frame_skip = (env_kwargs or {}).get("frame_skip", 1)
    if not isinstance(frame_skip, Integral) or frame_skip < 1:
        raise ConfigError(f"env_kwargs.frame_skip must be a whole number, 1 or more, got {frame_skip!r}")
    try:
        env = gymnasium.make(env_id, max_episode_steps=-1, disable_env_checker=True, **dict(env_kwargs or {}))
    except ConfigError:
        raise
    except (TypeError, ValueError, AssertionError, OSError, gymnasium.error.Error) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{env_id} cannot be made with env_kwargs {dict(env_kwargs or {})}: {reason}") from None
    mujoco_env(env)
    return env


def mujoco_env(env: Env) -> MujocoEnv:
    """Return the MuJoCo task below all wrappers.

    Raises:
        ConfigError: when there is none.
    """
    base = env.unwrapped
    if not isinstance(base, MujocoEnv):
        raise ConfigError(f"the task must be a Gymnasium MuJoCo task, got {type(base).__name__}")
    return base


def read_state(env: Env) -> Float64[np.ndarray, " state_dim"]:
    """Return a copy of the state [qpos, qvel]."""
    data = mujoco_env(env).data
    return np.concatenate([data.qpos, data.qvel])


def write_state(env: Env, state: Float64[np.ndarray, " state_dim"]) -> None:
    """Put the simulator in a state: same state, same future, whatever the simulator did before.

    Time, controls and the solver's warm start begin anew.

    Raises:
        ConfigError: when the state has the wrong length.
    """
    base = mujoco_env(env)
    num_positions, state_dim = base.model.nq, base.model.nq + base.model.nv
    if np.shape(state) != (state_dim,):
        raise ConfigError(f"state must have shape ({state_dim},), got {np.shape(state)}")
    mujoco.mj_resetData(base.model, base.data)
    values = np.asarray(state, np.float64)
    base.set_state(values[:num_positions], values[num_positions:])


def action_dim(env: Env) -> int:
    """Return the length of an action: not that of the simulator's controls where the task makes them from it."""
    shape = env.action_space.shape
    assert shape is not None
    return int(shape[0])


def action_offset(env: Env) -> Float64[np.ndarray, " action_dim"] | None:
    """Return the simulator's control less the action, or None where the task or a wrapper does more than add it."""
    base, shift = mujoco_env(env), wrapper_offset(env)
    if shift is None or hasattr(base, "controls_of"):
        return None
    return cast(np.ndarray, np.zeros(base.model.nu) + getattr(base, "action_offset", 0.0) + shift)


def control_map(env: Env) -> ControlMap | None:
    """Return the map from actions to the simulator's controls, or None where a wrapper does more than add a constant.

    A task that makes its controls from its actions has a method `controls_of`.
    """
    offset, shift = action_offset(env), wrapper_offset(env)
    if offset is not None:
        return lambda action: action.astype(np.float64) + offset
    if shift is None:
        return None
    own: ControlMap = mujoco_env(env).controls_of  # type: ignore[attr-defined]
    return lambda action: own(action.astype(np.float64) + shift)


def wrapper_offset(env: Env) -> Float64[np.ndarray, " action_dim"] | None:
    """Return what the wrappers add to the action, or None where one of them does more than add a constant."""
    offset = np.zeros(action_dim(env))
    current = env
    while isinstance(current, gymnasium.Wrapper):
        if not isinstance(current, _NEUTRAL_WRAPPERS):
            own = current.__dict__.get("action_offset")
            if own is None:
                return None
            offset = offset + own
        current = current.env
    return cast(np.ndarray, offset)


def unclipped_range(env: Env) -> tuple[Float32[np.ndarray, " action_dim"], Float32[np.ndarray, " action_dim"]]:
    """Return the lowest and highest actions (float32) of the action space that the simulator does not clip.

    Raises:
        ConfigError: when it clips all of them, so that none has an effect of its own.
    """
    model, space = mujoco_env(env).model, cast(gymnasium.spaces.Box, env.action_space)
    offset = action_offset(env)
    low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
    if offset is not None:
        limited = model.actuator_ctrllimited.astype(bool)
        low = np.maximum(low, np.where(limited, model.actuator_ctrlrange[:, 0] - offset, -np.inf))
        high = np.minimum(high, np.where(limited, model.actuator_ctrlrange[:, 1] - offset, np.inf))
    if (low > high).any():
        raise ConfigError(
            "action_offset must leave actions that the simulator does not clip; they would lie between "
            f"{low.tolist()} and {high.tolist()}; give one nearer to 0"
        )
    return round_inward(low, up=True), round_inward(high, up=False)


def round_inward(values: Float64[np.ndarray, " n"], up: bool) -> Float32[np.ndarray, " n"]:
    """Round to float32 without passing the value: float32(0.4) is above 0.4."""
    rounded = values.astype(np.float32)
    passed = rounded < values if up else rounded > values
    direction = np.float32(np.inf if up else -np.inf)
    return np.where(passed, np.nextafter(rounded, direction), rounded).astype(np.float32)


class OpenLoopSimulator:
    """Run sequences of actions in C, with the same bits as `env.step` gives.

    Use `for_env`: it returns None where a task's `step` does more than simulate.
    """

    def __init__(self, env: Env, controls_of: ControlMap) -> None:
        """Share the model and data of `env`."""
        base = mujoco_env(env)
        self._model, self._data = base.model, base.data
        self._frame_skip, self._controls_of = base.frame_skip, controls_of
        self._state_dim = base.model.nq + base.model.nv
        self._full_dim = mujoco.mj_stateSize(base.model, FULL_PHYSICS)
        self._rollout = mujoco_rollout.Rollout(nthread=0)

    @classmethod
    def for_env(cls, env: Env, num_probe_steps: int = 4) -> OpenLoopSimulator | None:
        """Return a simulator for `env` if it repeats a few random steps of `env.step` bit for bit. Resets `env`."""
        controls_of = control_map(env)
        if controls_of is None:
            return None
        generator = np.random.default_rng(0)
        low, high = unclipped_range(env)
        finite_low, finite_high = np.maximum(low, -1e3), np.minimum(high, 1e3)
        actions = generator.uniform(finite_low, finite_high, (num_probe_steps, len(low))).astype(np.float32)
        env.reset(seed=0)
        start = read_state(env)
        write_state(env, start)
        expected = []
        for action in actions:
            env.step(action)
            expected.append(read_state(env))
        write_state(env, start)
        simulator = cls(env, controls_of)
        return simulator if np.array_equal(simulator.run(actions), np.stack(expected)) else None

    @property
    def warned(self) -> bool:
        """Whether MuJoCo warned since the last reset, and so may have stopped or reset a run."""
        return bool(self._data.warning.number.any())

    def save(self) -> Float64[np.ndarray, " full_dim"]:
        """Return all that the future depends on, the solver's warm start included."""
        full = np.empty(mujoco.mj_stateSize(self._model, INTEGRATION))
        mujoco.mj_getState(self._model, self._data, full, INTEGRATION)
        return full

    def restore(self, full: Float64[np.ndarray, " full_dim"]) -> None:
        """Go back to what `save` returned."""
        mujoco.mj_resetData(self._model, self._data)
        mujoco.mj_setState(self._model, self._data, full, INTEGRATION)

    def run(self, actions: Float32[np.ndarray, "steps action_dim"]) -> Float64[np.ndarray, "steps state_dim"]:
        """Apply the actions from the task's current state on, and return the states after each."""
        full = np.empty((1, self._full_dim))
        mujoco.mj_getState(self._model, self._data, full[0], FULL_PHYSICS)
        warm_start = self._data.qacc_warmstart[None].copy()
        return self._steps(full, warm_start, actions[None]).reshape(len(actions), self._state_dim)

    def step_each(
        self, states: Float64[np.ndarray, "rows state_dim"], actions: Float64[np.ndarray, "rows action_dim"]
    ) -> Float64[np.ndarray, "rows state_dim"]:
        """Return the state after one action from each state, as after `write_state`."""
        full = np.zeros((len(states), self._full_dim))
        full[:, 1 : 1 + self._state_dim] = states
        warm_start = np.zeros((len(states), self._model.nv))
        return self._steps(full, warm_start, actions[:, None])[:, 0]

    def _steps(self, full: np.ndarray, warm_start: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Roll out (batch, steps) actions; returns the states (batch, steps, state_dim)."""
        batch_size, num_steps = actions.shape[:2]
        num_ticks = num_steps * self._frame_skip
        controls = np.repeat(self._controls_of(actions), self._frame_skip, axis=1)
        ticks = np.empty((batch_size, num_ticks, self._full_dim))
        sensors = np.empty((batch_size, num_ticks, self._model.nsensordata))
        self._rollout.rollout(
            [self._model] * batch_size,
            [self._data],
            full,
            controls,
            skip_checks=True,
            nstep=num_ticks,
            initial_warmstart=warm_start,
            state=ticks,
            sensordata=sensors,
        )
        return ticks[:, self._frame_skip - 1 :: self._frame_skip, 1 : 1 + self._state_dim].copy()


def _nearest_id(env_id: str) -> str:
    known = [name for name, spec in gymnasium.registry.items() if "mujoco" in str(spec.entry_point)]
    return nearest(env_id, [*known, *(name for name in gymnasium.registry if name.startswith("InvertedPendulum"))])
