"""Registration of the tasks with Gymnasium."""

from __future__ import annotations

from typing import Any

import gymnasium

from invdyn.envs.collect_config import PHYSICS_SHIFT_ID

INTEGRABLE_PENDULUM_ID = "InvertedPendulumIntegrable-v5"
SHIFTED_PENDULUM_ID = "InvertedPendulumIntegrableDynamicsShift-v5"
TWO_FACTOR_PENDULUM_ID = "InvertedPendulumTwoFactor-v5"
ANTAGONIST_PENDULUM_ID = "InvertedPendulumAntagonist-v5"
DEAD_ZONE_PENDULUM_ID = "InvertedPendulumDeadZone-v5"
DEFAULT_ACTION_OFFSET = 0.5

_PENDULUM: dict[str, Any] = {
    "entry_point": "invdyn.envs.pendulum:InvertedPendulumIntegrableEnv",
    "max_episode_steps": 1000,
    "reward_threshold": 950.0,
}
_MANY_VALUED = {**_PENDULUM, "entry_point": "invdyn.envs.pendulum:InvertedPendulumManyValuedEnv"}
_TASKS: dict[str, dict[str, Any]] = {
    INTEGRABLE_PENDULUM_ID: _PENDULUM,
    SHIFTED_PENDULUM_ID: {**_PENDULUM, "kwargs": {"action_offset": DEFAULT_ACTION_OFFSET}},
    TWO_FACTOR_PENDULUM_ID: {**_MANY_VALUED, "kwargs": {"actuation": "two_factor"}},
    ANTAGONIST_PENDULUM_ID: {**_MANY_VALUED, "kwargs": {"actuation": "antagonist"}},
    DEAD_ZONE_PENDULUM_ID: {**_MANY_VALUED, "kwargs": {"actuation": "dead_zone"}},
    PHYSICS_SHIFT_ID: {"entry_point": "invdyn.envs.physics:make_shifted", "disable_env_checker": True},
}


def register() -> None:
    """Register the tasks with Gymnasium; doing so again changes nothing."""
    for task_id, spec in _TASKS.items():
        if task_id not in gymnasium.registry:
            gymnasium.register(id=task_id, **spec)
