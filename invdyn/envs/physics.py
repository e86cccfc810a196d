"""Changed physics for any MuJoCo task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from invdyn.config import validate
from invdyn.envs.collect_config import PhysicsConfig
from invdyn.envs.task import action_dim, make_env, mujoco_env
from invdyn.errors import ConfigError

_FIELDS: dict[str, tuple[str, ...]] = {
    "mass": ("body_mass", "body_inertia"),
    "gear": ("actuator_gear",),
    "friction": ("geom_friction", "pair_friction", "dof_frictionloss", "tendon_frictionloss"),
    "damping": (
        "dof_damping",
        "dof_dampingpoly",
        "tendon_damping",
        "tendon_dampingpoly",
        "actuator_damping",
        "actuator_dampingpoly",
    ),
    "armature": ("dof_armature", "tendon_armature", "actuator_armature"),
}


class PhysicsShift(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """A MuJoCo task with multiplied physics and a constant added to its actions.

    The action space stays the task's own; the simulator clips action + action_offset to its control range.

    Attributes:
        action_offset: constant added to every action (action_dim,), float64.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        mass: float = 1.0,
        gear: float = 1.0,
        friction: float = 1.0,
        damping: float = 1.0,
        armature: float = 1.0,
        action_offset: float | Sequence[float] = 0.0,
    ) -> None:
        """Change the physics of `env` in place; the multipliers are described in `PhysicsConfig`.

        Raises:
            ConfigError: when the task is not a MuJoCo task, or has nothing that a multiplier could change.
        """
        RecordConstructorArgs.__init__(
            self,
            mass=mass,
            gear=gear,
            friction=friction,
            damping=damping,
            armature=armature,
            action_offset=action_offset,
        )
        gymnasium.Wrapper.__init__(self, env)
        multipliers = {"mass": mass, "gear": gear, "friction": friction, "damping": damping, "armature": armature}
        values = {**multipliers, "action_offset": action_offset}
        validate(PhysicsConfig, values, where="PhysicsShift")
        model = mujoco_env(env).model
        self.action_offset = _per_dimension(action_offset, action_dim(self))
        changed = {name: value for name, value in multipliers.items() if value != 1.0}
        for name, value in changed.items():
            _multiply(model, name, value)
        if changed:
            # MuJoCo derives constants from masses when it compiles a model (inverse weights, subtree masses).
            mujoco.mj_setConst(model, mujoco.MjData(model))

    def step(self, action: Any) -> Any:
        """Step the task with action + action_offset."""
        return self.env.step(np.asarray(action, np.float64) + self.action_offset)


def make_shifted(
    task_id: str,
    task_kwargs: Mapping[str, Any] | None = None,
    *,
    mass: float = 1.0,
    gear: float = 1.0,
    friction: float = 1.0,
    damping: float = 1.0,
    armature: float = 1.0,
    action_offset: float | Sequence[float] = 0.0,
    render_mode: str | None = None,
) -> PhysicsShift:
    """Make a task with changed physics: `gymnasium.make("PhysicsShift-v0", task_id="HalfCheetah-v5", mass=1.5)`.

    Raises:
        ConfigError: when the task cannot be made, or has nothing that a multiplier could change.
    """
    kwargs = dict(task_kwargs or {})
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    return PhysicsShift(
        make_env(task_id, kwargs),
        mass=mass,
        gear=gear,
        friction=friction,
        damping=damping,
        armature=armature,
        action_offset=action_offset,
    )


def _multiply(model: mujoco.MjModel, name: str, value: float) -> None:
    fields = [getattr(model, field) for field in _FIELDS[name] if hasattr(model, field)]
    if not any(np.any(field) for field in fields):
        raise ConfigError(f"{name} multiplier must be 1 for a task that has no {name}, got {value}; leave it out")
    for field in fields:
        field[:] = field * value


def _per_dimension(values: float | Sequence[float], size: int) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.shape not in ((), (size,)):
        raise ConfigError(f"action_offset must be one number or {size} numbers, got {array.size}")
    return np.broadcast_to(array, (size,)).copy()
