"""Baseline: the ridge solution on [s, past differences, s' - s], read off the statistics of the dataset."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from invdyn.models.base import InverseDynamics, Noise


class LinearInverse(InverseDynamics):
    """The linear inverse: complete after `fit_normalization`, nothing to train.

    Args:
        state_dim: size of one state.
        action_dim: size of one action.
        history: number of past states.
        horizon: number of actions predicted.
    """

    trainable = False
    is_point = True

    def __init__(self, state_dim: int, action_dim: int, *, history: int = 0, horizon: int = 1) -> None:
        super().__init__(state_dim, action_dim, history=history, horizon=horizon, base="linear", normalize=True)

    @override
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the mean square of the whitened residual: 1 on the rows of the fit."""
        return target.square().mean()

    @override
    def _targets_from_noise(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        return torch.zeros_like(noise)
