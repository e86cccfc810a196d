"""Fixed-step solvers of dx/dt = velocity(x, t) from t = 0 (noise) to t = 1 (action).

None of them evaluates the velocity at t = 1, where it is a difference of nearly equal numbers over a vanishing time and
a network is at its worst: Heun's and the classic Runge-Kutta method do, with large errors near the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from invdyn.config import nearest
from invdyn.errors import ConfigError

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Solver:
    """A one-step method.

    Attributes:
        step: maps (velocity, x, t, dt) to x at t + dt.
        evaluations_per_step: network evaluations that one step costs.
    """

    step: Callable[[Velocity, Tensor, float, float], Tensor]
    evaluations_per_step: int

    def integrate(self, velocity: Velocity, x_0: Tensor, num_steps: int) -> Tensor:
        """Carry `x_0` from t = 0 to t = 1 in `num_steps` equal steps; any shape."""
        x = x_0
        for index in range(num_steps):
            x = self.step(velocity, x, index / num_steps, 1.0 / num_steps)
        return x


def euler_step(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    """Advance by the velocity at the start of the step: order 1."""
    return x.add(velocity(x, t), alpha=dt)


def midpoint_step(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    """Advance by the velocity at the middle of the step, reached by half an Euler step: order 2."""
    middle = euler_step(velocity, x, t, dt / 2)
    return x.add(velocity(middle, t + dt / 2), alpha=dt)


SOLVERS = {
    "euler": Solver(euler_step, evaluations_per_step=1),
    "midpoint": Solver(midpoint_step, evaluations_per_step=2),
}


def get_solver(name: str) -> Solver:
    """Return the solver of that name.

    Raises:
        ConfigError: when there is none.
    """
    if name not in SOLVERS:
        raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}; {nearest(name, SOLVERS)}")
    return SOLVERS[name]
