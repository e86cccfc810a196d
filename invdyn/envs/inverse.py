"""The exact physical inverse of one simulator step: which action took the state to the next state?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from jaxtyping import Bool, Float, Float64

from invdyn.envs.replay import check_rows
from invdyn.envs.task import action_offset, make_env, mujoco_env
from invdyn.errors import ConfigError, DataError

_INTEGRATORS = mujoco.mjtIntegrator
_IMPLICIT = (_INTEGRATORS.mjINT_IMPLICIT, _INTEGRATORS.mjINT_IMPLICITFAST, _INTEGRATORS.mjINT_DISCRETE)
_GAINS = (int(mujoco.mjtGain.mjGAIN_FIXED), int(mujoco.mjtGain.mjGAIN_AFFINE))
_BIASES = (int(mujoco.mjtBias.mjBIAS_NONE), int(mujoco.mjtBias.mjBIAS_AFFINE))
_RANK_TOLERANCE = 1e-9
_CLIP_TOLERANCE = 1e-5
"""How near to the bound a control counts as clipped, relative: inverses of float32 states scatter by about 1e-6."""


@dataclass(frozen=True)
class InverseSolution:
    """What the physical inverse says about each transition.

    Attributes:
        action: least-squares actions (rows, action_dim), float64.
        constrained: whether a joint limit or a contact was active in the state (rows,). The inverse then goes through
            the soft constraint: it is as exact as the forward solver, and it amplifies rounding of the states.
        saturated: whether the simulator's control range bounds the action (rows,): any action further out would have
            had the same effect.
        residual: generalised force that no action explains, relative to the force of the transition (rows,). Far from
            zero, the transition did not come from this task.
    """

    action: Float64[np.ndarray, "rows action_dim"]
    constrained: Bool[np.ndarray, " rows"]
    saturated: Bool[np.ndarray, " rows"]
    residual: Float64[np.ndarray, " rows"]


class PhysicalInverse:
    """Invert one simulator step exactly, by MuJoCo's discrete-time inverse dynamics.

    qacc = (qvel' - qvel) / dt; `mj_inverse` gives the generalised force that the actuators must have produced; the
    controls follow by least squares over the actuators' moment matrix times gain; the action is the control less the
    task's action offset. Of next_state only the velocity is used: the next position follows from it.

    Actions outside of the control range are clipped by the simulator, so for them the bound comes back.

    Attributes:
        state_dim: length of a state [qpos, qvel].
        action_dim: length of an action.

    Example:
        >>> inverse = PhysicalInverse("InvertedPendulumIntegrable-v5")
        >>> inverse(np.zeros((1, 4)), np.zeros((1, 4))).shape
        (1, 1)
    """

    def __init__(self, env_id: str, env_kwargs: Mapping[str, Any] | None = None, *, of_controls: bool = False) -> None:
        """Make the task and check that its step has an inverse.

        Args:
            env_id: Gymnasium id.
            env_kwargs: arguments of the task.
            of_controls: return the simulator's controls in place of actions, whatever the task makes them from.

        Raises:
            ConfigError: when the task cannot be made, or its step or its actuators cannot be inverted.
        """
        env = make_env(env_id, env_kwargs)
        base = mujoco_env(env)
        offset = np.zeros(base.model.nu) if of_controls else action_offset(env)
        if offset is None:
            raise ConfigError(_why_no_offset(env_id, base))
        _check_invertible(env_id, base.model, base.frame_skip)
        self._model = copy.copy(base.model)
        self._model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_INVDISCRETE.value
        self._model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CLAMPCTRL.value
        self._data = mujoco.MjData(self._model)
        self._offset = offset
        self._control_range = np.where(
            base.model.actuator_ctrllimited.astype(bool)[:, None], base.model.actuator_ctrlrange, [-np.inf, np.inf]
        )
        self.state_dim, self.action_dim = base.model.nq + base.model.nv, base.model.nu
        self._check_actuators(env_id)
        env.close()

    def __call__(
        self, state: Float[np.ndarray, "rows state_dim"], next_state: Float[np.ndarray, "rows state_dim"]
    ) -> Float64[np.ndarray, "rows action_dim"]:
        """Return the actions that took each state to its next state."""
        return self.solve(state, next_state).action

    def solve(
        self, state: Float[np.ndarray, "rows state_dim"], next_state: Float[np.ndarray, "rows state_dim"]
    ) -> InverseSolution:
        """Return the actions, and where they should not be trusted.

        Raises:
            DataError: when shapes do not fit the task, or a value is not finite.
        """
        states, next_states = np.asarray(state, np.float64), np.asarray(next_state, np.float64)
        check_rows("state", states, self.state_dim)
        check_rows("next_state", next_states, self.state_dim)
        if len(states) != len(next_states):
            raise DataError(f"state and next_state must have as many rows, got {len(states)} and {len(next_states)}")
        num_velocities = self._model.nv
        accelerations = (next_states[:, -num_velocities:] - states[:, -num_velocities:]) / self._model.opt.timestep
        forces = np.empty((len(states), num_velocities))
        gains = np.empty((len(states), num_velocities, self.action_dim))
        scales = np.empty(len(states))
        constrained = np.empty(len(states), bool)
        for row, (one_state, acceleration) in enumerate(zip(states, accelerations, strict=True)):
            forces[row], scales[row], constrained[row] = self._force(one_state, acceleration)
            gains[row] = self._gain(forces[row])
        controls = (np.linalg.pinv(gains) @ forces[:, :, None])[:, :, 0]
        unexplained = np.abs((gains @ controls[:, :, None])[:, :, 0] - forces).max(axis=1)
        low, high = self._control_range.T
        margin = _CLIP_TOLERANCE * np.maximum(1.0, np.abs(controls))
        saturated = ((controls <= low + margin) | (controls >= high - margin)).any(axis=1)
        residual = unexplained / np.maximum(scales, np.finfo(np.float64).tiny)
        return InverseSolution(controls - self._offset, constrained, saturated, residual)

    def _force(self, state: np.ndarray, acceleration: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Return the force of the actuators (nv,), its scale, and whether a limit or contact is active."""
        model, data = self._model, self._data
        num_positions = model.nq
        data.qpos[:], data.qvel[:], data.qacc[:] = state[:num_positions], state[num_positions:], acceleration
        data.ctrl[:] = 0.0
        mujoco.mj_inverse(model, data)
        # Rows of constraints come as equality, friction, then limits and contacts: only these come and go.
        constrained = data.nefc > data.ne + data.nf
        return data.qfrc_inverse, float(np.abs(data.qfrc_inverse).max()), constrained

    def _gain(self, force: np.ndarray) -> np.ndarray:
        """Return d force / d control (nv, action_dim) in the current state, and take the controls' bias off `force`."""
        model, data = self._model, self._data
        mujoco.mj_fwdActuation(model, data)
        force -= data.qfrc_actuator
        bias = data.actuator_force.copy()
        data.ctrl[:] = 1.0
        mujoco.mj_fwdActuation(model, data)
        moment: np.ndarray = np.empty((model.nu, model.nv))
        mujoco.mju_sparse2dense(
            moment, data.actuator_moment, data.moment_rownnz, data.moment_rowadr, data.moment_colind
        )
        gain: np.ndarray = moment.T * (data.actuator_force - bias)
        return gain

    def _check_actuators(self, env_id: str) -> None:
        """Check that different controls have different effects in the initial state."""
        at_rest = np.zeros(self._model.nv)
        force, _, _ = self._force(np.concatenate([self._model.qpos0, at_rest]), at_rest)
        singular = np.linalg.svd(self._gain(force.copy()), compute_uv=False)
        rank = int((singular > _RANK_TOLERANCE * singular.max(initial=0.0)).sum())
        if rank < self.action_dim:
            raise ConfigError(
                f"{env_id} cannot be inverted: {self.action_dim} controls act through {rank} independent forces, "
                "so several actions have the same effect"
            )


def _why_no_offset(env_id: str, base: MujocoEnv) -> str:
    if hasattr(base, "controls_of"):
        return (
            f"{env_id} cannot be inverted: several of its actions have the same effect; ActionPosterior has all of them"
        )
    return f"{env_id} cannot be inverted: a wrapper changes its actions; name the bare task"


def _check_invertible(env_id: str, model: mujoco.MjModel, frame_skip: int) -> None:
    """Check integrator, frame skip and actuator types.

    Raises:
        ConfigError: naming the first one that has no inverse.
    """
    integrator = _INTEGRATORS(model.opt.integrator)
    problem = None
    if frame_skip != 1:
        problem = f"frame_skip must be 1, got {frame_skip}; give frame_skip=1 or use InvertedPendulumIntegrable-v5"
    elif integrator == _INTEGRATORS.mjINT_RK4:
        problem = "the RK4 integrator has no closed-form inverse; use a task with the Euler integrator"
    elif model.nu == 0:
        problem = "it has no actuators"
    elif model.na or (model.actuator_dyntype != mujoco.mjtDyn.mjDYN_NONE).any():
        problem = "its actuators have states of their own, which are not part of [qpos, qvel]"
    elif not (np.isin(model.actuator_gaintype, _GAINS).all() and np.isin(model.actuator_biastype, _BIASES).all()):
        problem = "its actuators are not motors, position or velocity servos (muscles, for example)"
    elif model.actuator_forcelimited.any() or model.jnt_actfrclimited.any():
        problem = "the forces of its actuators are limited, so several actions have the same effect"
    elif integrator in _IMPLICIT and _gain_varies_with_velocity(model):
        problem = "an implicit integrator with gains that vary with velocity makes the step nonlinear in the action"
    if problem:
        raise ConfigError(f"{env_id} cannot be inverted: {problem}")


def _gain_varies_with_velocity(model: mujoco.MjModel) -> bool:
    affine = model.actuator_gaintype == mujoco.mjtGain.mjGAIN_AFFINE
    return bool((affine & (model.actuator_gainprm[:, 2] != 0.0)).any())
