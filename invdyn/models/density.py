"""The log density of a flow: the instantaneous change of variables, with the exact divergence, in float64.

Source: Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential Equations" (2018), eq. 8:
d ln p(x(t)) / dt = -div velocity(x(t), t).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp

from invdyn.models.solvers import QUARTER_TURN, Velocity, angular_field

NUM_STEPS = 32


@torch.no_grad()
def flow_log_prob(
    velocity: Velocity, x_1: Float[Tensor, "batch dim"], *, num_steps: int = NUM_STEPS, angular: bool = True
) -> Float[Tensor, " batch"]:
    """Return ln p of the flow that carries N(0, I) along `velocity`, at points x_1.

    The points are carried back to the noise by the classic Runge-Kutta method, with the divergence beside them.

    Args:
        velocity: dx/dt on the straight path of (samples, batch, dim), smooth up to t = 1; no row depends on another.
        x_1: points at t = 1, in the dtype to compute in.
        num_steps: Runge-Kutta steps; the error falls with the fourth power of it.
        angular: step along the angle of the circle (where a nearly normal target has a nearly zero field).

    Returns:
        (batch,) nats per unit of x_1.
    """
    length = QUARTER_TURN if angular else 1.0
    field = angular_field(velocity) if angular else velocity
    step = -length / num_steps
    x, volume = x_1, x_1.new_zeros(len(x_1))
    for index in range(num_steps):
        s = length * (1.0 - index / num_steps)
        v_1, d_1 = field_and_divergence(field, x, s)
        v_2, d_2 = field_and_divergence(field, x + step / 2 * v_1, s + step / 2)
        v_3, d_3 = field_and_divergence(field, x + step / 2 * v_2, s + step / 2)
        v_4, d_4 = field_and_divergence(field, x + step * v_3, max(s + step, 0.0))
        x = x + step / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
        volume = volume + step / 6 * (d_1 + 2 * d_2 + 2 * d_3 + d_4)
    log_noise = -0.5 * (x.square() + math.log(2 * math.pi)).sum(dim=1)
    # Backwards in time, `volume` is minus the integral of the divergence from 0 to 1.
    return log_noise + volume


def field_and_divergence(
    field: Velocity, x: Float[Tensor, "batch dim"], s: float
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
    """Return the field and its exact divergence: the forward derivatives of all dimensions and rows at once."""
    dims = x.shape[1]
    points = x.repeat(dims, 1, 1)  # not expanded: forward derivatives need memory of their own
    directions = torch.eye(dims, dtype=x.dtype, device=x.device)[:, None].repeat(1, len(x), 1)
    value, derivative = jvp(lambda y: field(y, s), (points,), (directions,))  # type: ignore[misc]
    return value[0], derivative.diagonal(dim1=0, dim2=2).sum(dim=1)
