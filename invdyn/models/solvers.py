"""Fixed-step solvers of dx/dt = velocity(x, t) from t = 0 (noise) to t = 1 (action).

None of them evaluates the velocity at t = 1, where it is a difference of nearly equal numbers over a vanishing time and
a network is at its worst: Heun's and the classic Runge-Kutta method do, with large errors near the end.

The angular solvers follow the same path in other coordinates: with sigma = sqrt(t^2 + (1 - t)^2), y = x / sigma moves
on a circle, y = cos(angle) x_0 + sin(angle) x_1, as the angle goes from 0 to pi / 2. There the field of a standard
normal target is zero, so that one step is exact for it, where the straight coordinates shrink it to its mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from invdyn.config import nearest
from invdyn.errors import ConfigError

Velocity = Callable[[Tensor, float], Tensor]
SolverName = Literal["euler", "midpoint", "angular_euler", "angular_midpoint"]

QUARTER_TURN = math.pi / 2


@dataclass(frozen=True)
class Solver:
    """A one-step method.

    Attributes:
        step: maps (velocity, x, t, dt) to x at t + dt.
        evaluations_per_step: network evaluations that one step costs.
        angular: whether it steps along the angle of the circle instead of the time of the straight line.
    """

    step: Callable[[Velocity, Tensor, float, float], Tensor]
    evaluations_per_step: int
    angular: bool = False

    def integrate(self, velocity: Velocity, x_0: Tensor, num_steps: int) -> Tensor:
        """Carry `x_0` from t = 0 to t = 1 in `num_steps` equal steps; any shape."""
        length = QUARTER_TURN if self.angular else 1.0
        field = angular_field(velocity) if self.angular else velocity
        x = x_0
        for index in range(num_steps):
            x = self.step(field, x, length * index / num_steps, length / num_steps)
        return x


def euler_step(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    """Advance by the velocity at the start of the step: order 1."""
    return x.add(velocity(x, t), alpha=dt)


def midpoint_step(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    """Advance by the velocity at the middle of the step, reached by half an Euler step: order 2."""
    middle = euler_step(velocity, x, t, dt / 2)
    return x.add(velocity(middle, t + dt / 2), alpha=dt)


def time_of_angle(angle: float) -> tuple[float, float]:
    """Return t and sigma = sqrt(t^2 + (1 - t)^2) at an angle of the circle, tan(angle) = t / (1 - t)."""
    sigma = 1.0 / (math.sin(angle) + math.cos(angle))
    return sigma * math.sin(angle), sigma


def angular_field(velocity: Velocity) -> Velocity:
    """Return dy/d(angle) of y = x / sigma, from dx/dt: sigma * velocity - (2 t - 1) y."""

    def field(y: Tensor, angle: float) -> Tensor:
        t, sigma = time_of_angle(angle)
        return (sigma * velocity(sigma * y, t)).sub(y, alpha=2.0 * t - 1.0)

    return field


SOLVERS = {
    "euler": Solver(euler_step, evaluations_per_step=1),
    "midpoint": Solver(midpoint_step, evaluations_per_step=2),
    "angular_euler": Solver(euler_step, evaluations_per_step=1, angular=True),
    "angular_midpoint": Solver(midpoint_step, evaluations_per_step=2, angular=True),
}


def get_solver(name: str) -> Solver:
    """Return the solver of that name.

    Raises:
        ConfigError: when there is none.
    """
    if name not in SOLVERS:
        raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}; {nearest(name, SOLVERS)}")
    return SOLVERS[name]
