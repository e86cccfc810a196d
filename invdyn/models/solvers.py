"""Fixed-step solvers of dx/dt = velocity(x, t) from t = 0 (noise) to t = 1 (action).

None of them evaluates the velocity at t = 1, where it is a difference of nearly equal numbers over a vanishing time and
a network is at its worst: Heun's and the classic Runge-Kutta method do, with large errors near the end.

The angular solvers follow the same path in other coordinates: with sigma = sqrt(t^2 + (1 - t)^2), y = x / sigma moves
on a circle, y = cos(angle) x_0 + sin(angle) x_1, as the angle goes from 0 to pi / 2. There the field of a standard
normal target is zero, so that one step is exact for it, where the straight coordinates shrink it to its mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from invdyn.config import nearest
from invdyn.errors import ConfigError

Velocity = Callable[[Tensor, float], Tensor]
Method = Callable[[Velocity, Tensor, Sequence[float]], Tensor]
SolverName = Literal["euler", "midpoint", "angular_euler", "angular_midpoint", "angular_adams"]

QUARTER_TURN = math.pi / 2
GRADING = 1.5
"""Exponent of graded steps: where a target is thin, the field gets steep towards the end (docs/flow.md)."""


@dataclass(frozen=True)
class Solver:
    """A method and where its steps end.

    Attributes:
        method: maps (velocity, x at the first time, times) to x at the last time.
        evaluations_per_step: network evaluations that one step costs.
        angular: whether it steps along the angle of the circle instead of the time of the straight line.
        grading: 1 for equal steps; above, steps get shorter towards the end: time 1 - (1 - i / n)^grading.
    """

    method: Method
    evaluations_per_step: int
    angular: bool = False
    grading: float = 1.0

    def integrate(self, velocity: Velocity, x_0: Tensor, num_steps: int) -> Tensor:
        """Carry `x_0` from t = 0 to t = 1 in `num_steps` steps; any shape."""
        length = QUARTER_TURN if self.angular else 1.0
        field = angular_field(velocity) if self.angular else velocity
        shares = (1.0 - (1.0 - index / num_steps) ** self.grading for index in range(num_steps + 1))
        return self.method(field, x_0, [length * share for share in shares])


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Advance by the velocity at the start of each step: order 1."""
    for t, end in pairwise(times):
        x = x.add(velocity(x, t), alpha=end - t)
    return x


def midpoint(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Advance by the velocity at the middle of each step, reached by half an Euler step: order 2."""
    for t, end in pairwise(times):
        half = (end - t) / 2
        middle = x.add(velocity(x, t), alpha=half)
        x = x.add(velocity(middle, t + half), alpha=end - t)
    return x


def adams_bashforth(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Advance by the velocity at the start of each step and that of the step before, extrapolated: order 2.

    Its first step is Euler's. Source: Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I" (1993),
    section III.5, for steps of any length.
    """
    before, length_before = None, 1.0
    for t, end in pairwise(times):
        slope, length = velocity(x, t), end - t
        x = x.add(slope, alpha=length)
        if before is not None:
            x = x.add(slope - before, alpha=length**2 / (2 * length_before))
        before, length_before = slope, length
    return x


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
    "euler": Solver(euler, evaluations_per_step=1),
    "midpoint": Solver(midpoint, evaluations_per_step=2),
    "angular_euler": Solver(euler, evaluations_per_step=1, angular=True),
    "angular_midpoint": Solver(midpoint, evaluations_per_step=2, angular=True),
    "angular_adams": Solver(adams_bashforth, evaluations_per_step=1, angular=True, grading=GRADING),
}


def get_solver(name: str) -> Solver:
    """Return the solver of that name.

    Raises:
        ConfigError: when there is none.
    """
    if name not in SOLVERS:
        raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}; {nearest(name, SOLVERS)}")
    return SOLVERS[name]
