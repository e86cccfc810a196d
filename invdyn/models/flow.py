"""The main model: a conditional flow that carries N(0, I) to the action of a transition.

Source: Lipman, Chen, Ben-Hamu, Nickel & Le, "Flow Matching for Generative Modeling" (2023), with the straight path of
Liu, Gong & Liu, "Flow Straight and Fast" (2023): x_t = (1 - t) x_0 + t x_1, with t = 0 noise and t = 1 action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from invdyn.errors import ConfigError
from invdyn.models.base import BaseKind, InverseDynamics, Noise
from invdyn.models.solvers import Velocity, get_solver
from invdyn.models.velocity import NETWORKS, NetworkKind

PredictionKind = Literal["velocity", "target"]


class FlowInverseDynamics(InverseDynamics):
    """Conditional flow matching on (normalised residuals of) actions.

    Args:
        state_dim: size of one state.
        action_dim: size of one action.
        diffusion_step_embed_dim: size of the time embedding, even.
        down_dims: widths of the network: the levels of the U-Net, or the hidden layers of the MLP.
        num_inference_steps: solver steps of `sample` unless it is told otherwise.
        network: "unet" (the reference network) or "mlp".
        prediction: what the network returns: "velocity" x_1 - x_0, or the "target" x_1 itself, which needs the fewest
            steps where the action is nearly determined by the transition.
        base: "linear" to carry noise to the whitened residual of the ridge solution.
        normalize: standardise inside the model.
        solver: "euler" or "midpoint" (two network evaluations per step).
        history: number of past states.
        horizon: number of actions predicted.

    Raises:
        ConfigError: when a size is below 1, `diffusion_step_embed_dim` is odd, or a name is unknown.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        diffusion_step_embed_dim: int = 16,
        down_dims: Sequence[int] = (16, 32, 64),
        num_inference_steps: int = 10,
        *,
        network: NetworkKind = "unet",
        prediction: PredictionKind = "velocity",
        base: BaseKind = "linear",
        normalize: bool = True,
        solver: str = "euler",
        history: int = 0,
        horizon: int = 1,
    ) -> None:
        super().__init__(state_dim, action_dim, history=history, horizon=horizon, base=base, normalize=normalize)
        if diffusion_step_embed_dim < 2 or diffusion_step_embed_dim % 2:
            raise ConfigError(f"diffusion_step_embed_dim must be even and positive, got {diffusion_step_embed_dim}")
        if not down_dims or min(down_dims) < 1:
            raise ConfigError(f"down_dims must be one or more positive widths, got {list(down_dims)}")
        if network not in NETWORKS:
            raise ConfigError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
        if prediction not in get_args(PredictionKind):
            raise ConfigError(f"prediction must be velocity or target, got {prediction!r}")
        get_solver(solver)
        _check_steps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.prediction = prediction
        self.solver = solver
        self.network = NETWORKS[network](self.target_dim, self.context_dim, diffusion_step_embed_dim, down_dims)

    @override
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of the network's prediction at x_t, t uniform.

        Args:
            context: (batch, context_dim), from `encode`.
            target: (batch, target_dim), from `encode`: x_1.
            noise: x_0 (batch, target_dim) and t (batch, 1), from `draw_noise`.
        """
        x_0, t = noise
        prediction = self.network(torch.lerp(x_0, target, t), t, context)
        return functional.mse_loss(prediction, target if self.prediction == "target" else target - x_0)

    @override
    def draw_noise(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Noise:
        """Draw x_0 ~ N(0, I), (batch, target_dim), and t ~ U[0, 1), (batch, 1)."""
        x_0 = torch.randn(batch_size, self.target_dim, generator=generator, device=device)
        return x_0, torch.rand(batch_size, 1, generator=generator, device=device)

    @override
    def _sample_targets(
        self,
        context: Float[Tensor, "batch context"],
        num_samples: int,
        num_inference_steps: int | None,
        solver: str | None,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "samples batch target"]:
        shape = (num_samples, len(context), self.target_dim)
        x_0 = torch.randn(shape, generator=generator, device=context.device)
        return self._targets_from_noise(context, x_0, num_inference_steps, solver)

    @override
    def _targets_from_noise(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        _check_steps(steps)
        return get_solver(solver or self.solver).integrate(self._velocity(context), noise, steps)

    def _velocity(self, context: Float[Tensor, "batch context"]) -> Velocity:
        """Return the velocity field of fixed transitions; the work that depends on them alone is done once, here."""
        embedded = self.network.embed_context(context)

        def velocity(x: Tensor, t: float) -> Tensor:
            time = self.network.embed_time(torch.full((1, 1), t, device=x.device))
            prediction = self.network.combine(x, embedded + time)
            return prediction if self.prediction == "velocity" else (prediction - x) / (1.0 - t)

        return velocity


def _check_steps(num_inference_steps: int) -> None:
    if num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps must be 1 or more, got {num_inference_steps}")
