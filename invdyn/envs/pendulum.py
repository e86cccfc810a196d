"""Inverted pendulums with a step that can be inverted exactly: to one action, or to all that are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.spaces import Box
from gymnasium.utils import EzPickle
from jaxtyping import Float, Float64

from invdyn.config import nearest
from invdyn.envs.actuation import ACTUATIONS, Actuation
from invdyn.errors import ConfigError


class InvertedPendulumIntegrableEnv(InvertedPendulumEnv):
    """Gymnasium's InvertedPendulum-v5 with one Euler step per action, and an optional constant added to the action.

    The stock task takes two RK4 steps, which have no closed-form inverse. State: (cart m, pole rad, cart m/s, pole
    rad/s); action: (cart force / gear,), within [-3, 3]. The pole may swing freely: the task never terminates, and
    whoever records it decides where an episode ends. The reward is the stock one, 1 while the pole is within 0.2 rad.

    The simulator clips action + action_offset to [-3, 3], so actions beyond that have the effect of the bound.

    Attributes:
        action_offset: constant added to every action (1,).
        never_terminates: a promise that `step` never returns terminated, so that episodes may run in C.
    """

    never_terminates = True

    def __init__(self, action_offset: float | Sequence[float] = 0.0, frame_skip: int = 1, **kwargs: Any) -> None:
        """Make the task; `kwargs` are those of Gymnasium's `InvertedPendulumEnv`."""
        super().__init__(frame_skip=frame_skip, **kwargs)
        EzPickle.__init__(self, action_offset=action_offset, frame_skip=frame_skip, **kwargs)
        self.model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
        self.action_offset = np.broadcast_to(np.asarray(action_offset, np.float64), (self.model.nu,)).copy()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Advance by one step of the simulator (0.02 s); `terminated` is always False."""
        shifted = np.asarray(action, np.float64) + self.action_offset
        observation, reward, _, truncated, info = super().step(shifted)  # type: ignore[no-untyped-call]
        return observation, reward, False, truncated, info


class InvertedPendulumManyValuedEnv(InvertedPendulumIntegrableEnv):
    """The integrable pendulum with an actuation between its action and its motor, so that several actions are right.

    Of a transition the motor's force can be recovered exactly, and with it the distribution of the actions that give
    that force (`invdyn.envs.posterior`).

    Attributes:
        actuation: what makes the motor's command from the action.
    """

    def __init__(self, actuation: str = "two_factor", **kwargs: Any) -> None:
        """Make the task; `kwargs` are those of Gymnasium's `InvertedPendulumEnv`.

        Args:
            actuation: "two_factor", "antagonist" or "dead_zone" (`invdyn.envs.actuation`).
            kwargs: of the pendulum.

        Raises:
            ConfigError: when there is no such actuation.
        """
        if actuation not in ACTUATIONS:
            raise ConfigError(
                f"actuation must be one of {', '.join(ACTUATIONS)}, got {actuation!r}; {nearest(actuation, ACTUATIONS)}"
            )
        super().__init__(**kwargs)
        EzPickle.__init__(self, actuation=actuation, **kwargs)
        self.actuation: Actuation = ACTUATIONS[actuation]
        self.action_space = Box(np.array(self.actuation.low, np.float32), np.array(self.actuation.high, np.float32))

    def controls_of(self, action: Float[np.ndarray, "*batch action_dim"]) -> Float64[np.ndarray, "*batch num_controls"]:
        """Return the simulator's controls of actions, which may lie out of bounds: the simulator clips controls."""
        return self.actuation.force(action)[..., None] + self.action_offset

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Advance by one step of the simulator (0.02 s); `terminated` is always False."""
        return super().step(self.actuation.force(np.asarray(action))[..., None])
