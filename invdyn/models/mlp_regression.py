"""Baseline: least-squares regression by an MLP. One action per transition, so it averages where several are right."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from invdyn.models.base import BaseKind, InverseDynamics, Noise
from invdyn.models.networks import build_mlp


class MLPRegression(InverseDynamics):
    """E[action | state, next_state] by a plain MLP on the normalised features.

    Args:
        state_dim: size of one state.
        action_dim: size of one action.
        down_dims: widths of the hidden layers.
        base: "linear" to regress the whitened residual of the ridge solution.
        normalize: standardise inside the model.
        history: number of past states.
        horizon: number of actions predicted.

    Raises:
        ConfigError: when a width is below 1.
    """

    is_point = True

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        down_dims: Sequence[int] = (128, 128, 128),
        *,
        base: BaseKind = "linear",
        normalize: bool = True,
        history: int = 0,
        horizon: int = 1,
    ) -> None:
        super().__init__(state_dim, action_dim, history=history, horizon=horizon, base=base, normalize=normalize)
        self.network = build_mlp(self.context_dim, down_dims, self.target_dim)

    @override
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the mean squared error, weighed by direction; `noise` is empty."""
        return self.squared_error(self.network(context), target)

    @override
    def _targets_from_noise(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        prediction: Tensor = self.network(context)
        return prediction.expand(noise.shape[0], -1, -1)
