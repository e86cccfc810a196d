from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from invdyn.errors import ConfigError
from invdyn.models.solvers import QUARTER_TURN, SOLVERS, adams_bashforth, get_solver


def growth(x: Tensor, t: float) -> Tensor:
    """dx/dt = x cos t, so x(1) = x(0) e^(sin 1)."""
    return x * math.cos(t)


@pytest.mark.parametrize(
    ("name", "order"),
    [("euler", 1), ("midpoint", 2), ("angular_euler", 1), ("angular_midpoint", 2), ("angular_adams", 2)],
)
def test_order_of_convergence(name: str, order: int) -> None:
    x_0 = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = x_0 * math.exp(math.sin(1.0))
    errors = [(SOLVERS[name].integrate(growth, x_0, steps) - exact).abs().max() for steps in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
def test_the_end_is_never_evaluated(name: str, steps: int) -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.ones_like(x)

    x_1 = SOLVERS[name].integrate(velocity, torch.zeros(2), steps)
    if not SOLVERS[name].angular:
        torch.testing.assert_close(x_1, torch.ones(2))
    assert len(times) == steps * SOLVERS[name].evaluations_per_step
    assert times[0] == 0.0
    assert max(times) <= 1.0 - 0.5 / steps ** SOLVERS[name].grading + 1e-12


@pytest.mark.parametrize("steps", [1, 3])
def test_what_one_step_is_exact_for(steps: int) -> None:
    """A point target in straight coordinates; a standard normal target on the circle, where the field is zero."""
    x_0 = torch.randn(10, generator=torch.Generator().manual_seed(0))
    found = SOLVERS["euler"].integrate(lambda x, t: (3.0 - x) / (1 - t), x_0, steps)
    torch.testing.assert_close(found, torch.full((10,), 3.0))
    found = SOLVERS["angular_euler"].integrate(lambda x, t: (2 * t - 1) / ((1 - t) ** 2 + t**2) * x, x_0, steps)
    torch.testing.assert_close(found, x_0)


def test_adams_is_exact_for_velocities_linear_in_the_angle() -> None:
    """After its first step, which is Euler's: whatever the lengths of the steps, here dy/d(angle) = angle."""
    ends = [0.0, 0.4, 0.9, 1.1]
    found = adams_bashforth(torch.full_like, torch.zeros(1, dtype=torch.float64), ends)
    torch.testing.assert_close(found, torch.tensor([(1.1**2 - 0.4**2) / 2], dtype=torch.float64))


def test_graded_steps_get_shorter_towards_the_end() -> None:
    angles: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        angles.append(math.atan2(t, 1.0 - t) / QUARTER_TURN)
        return x

    SOLVERS["angular_adams"].integrate(velocity, torch.ones(1), 4)
    assert angles == pytest.approx([0.0, 1 - 0.75**1.5, 1 - 0.5**1.5, 1 - 0.25**1.5])


def test_the_start_is_left_as_it_was() -> None:
    x_0 = torch.zeros(2)
    SOLVERS["midpoint"].integrate(lambda x, t: torch.ones_like(x), x_0, 3)
    assert not x_0.any()


def test_unknown_solver() -> None:
    with pytest.raises(
        ConfigError,
        match="solver must be one of euler, midpoint, angular_euler, angular_midpoint, angular_adams, got 'heun'",
    ):
        get_solver("heun")
