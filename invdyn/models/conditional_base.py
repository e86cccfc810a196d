"""The mean and spread of an action given its transition: what the flow need not learn.

A flow learns best where its target looks like its noise. This network regresses the target (the residual of the linear
inverse) and learns how far off it is, so that the flow carries N(0, I) to a residual of about unit spread everywhere:
where the action is nearly determined, one step of the flow is already a calibrated sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from invdyn.models.networks import distance, hidden_layers

SCALE_WIDTH = 32
MIN_LOG_SCALE = -16.0

ROUNDING = 0.02
"""Errors far below it, in units of the target's spread, are minimised by their square (see `distance`)."""


class Conditional(NamedTuple):
    """What is known of a target from its transition alone.

    Attributes:
        mean: (batch, dim), trained by distance: where several targets are right, their median rather than their mean.
        log_scale: (batch, dim), natural logarithm of the spread.
        features: (batch, width), of the last hidden layer.
    """

    mean: Float[Tensor, "batch dim"]
    log_scale: Float[Tensor, "batch dim"]
    features: Float[Tensor, "batch width"]


class ConditionalBase(nn.Module):
    """A regression network with a spread per dimension.

    Args:
        context_dim: size of the context.
        dim: size of the target.
        widths: hidden layers.
        gates: how many units of the first layer are gated.
    """

    def __init__(self, context_dim: int, dim: int, widths: Sequence[int], gates: int = 0) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*hidden_layers(context_dim, widths, gates))
        self.mean = nn.Linear(widths[-1], dim)
        self.log_scale = nn.Sequential(nn.Linear(widths[-1], SCALE_WIDTH), nn.SiLU(), nn.Linear(SCALE_WIDTH, dim))

    def mean_of(self, context: Float[Tensor, "batch context"]) -> Float[Tensor, "batch dim"]:
        """Return the mean alone."""
        mean: Tensor = self.mean(self.trunk(context))
        return mean

    def parameters_of_mean(self) -> list[nn.Parameter]:
        """Return what the mean is made of; the rest makes the spread."""
        return [*self.trunk.parameters(), *self.mean.parameters()]

    def forward(self, context: Float[Tensor, "batch context"]) -> Conditional:
        """Return mean, spread and features; the spread's gradient stops at the features.

        The mean is trained by `mean_loss` alone: the likelihood of a spread that may still be wrong would weigh rows
        by it and slow the mean down by an order of magnitude. A spread is below 1, that of the target over all rows:
        where it would come out larger, the row is unlike those trained on. The bound is a sigmoid: a clamp has no
        gradient, and rows that begin above it would stay there.
        """
        features = self.trunk(context)
        log_scale = functional.logsigmoid(self.log_scale(features.detach())).clamp(MIN_LOG_SCALE)
        return Conditional(self.mean(features), log_scale, features)


def mean_loss(error: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return what the mean is trained by: the distance of its errors."""
    return distance(error, ROUNDING)


def conditional_loss(found: Conditional, target: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return `mean_loss` plus the Gaussian negative log likelihood of the spread."""
    error = target - found.mean
    fixed = error.detach()
    likelihood = found.log_scale + 0.5 * (fixed * torch.exp(-found.log_scale)).square()
    return mean_loss(error) + likelihood.mean()
