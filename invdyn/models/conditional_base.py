"""The mean and spread of an action given its transition: what the flow need not learn.

A flow learns best where its target looks like its noise. This network regresses the target (the residual of the linear
inverse) and learns how far off it is, so that the flow carries N(0, I) to a residual of about unit spread everywhere:
where the action is nearly determined, one step of the flow is already a calibrated sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from invdyn.models.networks import distance, hidden_layers

SCALE_WIDTH = 32
MIN_LOG_SCALE = -16.0

LARGEST_DISTANCE = 30.0
"""From the mean, in spreads, of targets in training and of samples: early a spread may be far too small, and of 300,000
draws one starts where no noise was in training."""

ROUNDING = 0.02
"""Errors far below it, in units of the target's spread, are minimised by their square (see `distance`)."""


class Conditional(NamedTuple):
    """What is known of a target from its transition alone.

    Attributes:
        mean: (batch, dim), trained by distance: where several targets are right, their median rather than their mean.
        log_scale: (batch, dim), natural logarithm of the spread.
        features: (batch, width), of the last hidden layer.
        tails: as of `ConditionalBase`.
    """

    mean: Float[Tensor, "batch dim"]
    log_scale: Float[Tensor, "batch dim"]
    features: Float[Tensor, "batch width"]
    tails: float | None = None


def residual_of(found: Conditional, target: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Return what is left of a target: its distance from the mean in spreads, or tails asinh(distance / tails).

    Noise is carried to a heavy tail only by a field that is steep there, and few rows teach it.
    """
    return compress((target - found.mean) * torch.exp(-found.log_scale), found.tails)


def target_of(found: Conditional, residual: Float[Tensor, "*samples batch dim"]) -> Float[Tensor, "*samples batch dim"]:
    """Return the target that a residual is left of."""
    return found.mean + found.log_scale.exp() * expand(residual, found.tails)


def log_volume(found: Conditional, residual: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
    """Return ln |d target / d residual|."""
    stretch = found.log_scale
    if found.tails is not None:
        stretch = stretch + torch.cosh(residual / found.tails).log()
    return stretch.sum(dim=1)


def compress(distance: Tensor, tails: float | None) -> Tensor:
    """Return distances as a flow sees them: nearly as they are below `tails`, by their logarithm far beyond.

    Args:
        distance: from the mean, in spreads; any shape.
        tails: None for all as they are.

    Example:
        >>> compress(torch.tensor([0.3, -30.0]), tails=3.0)
        tensor([ 0.2995, -8.9947])
    """
    return distance if tails is None else tails * torch.asinh(distance / tails)


def expand(residual: Tensor, tails: float | None) -> Tensor:
    """Return the distances that `compress` gives residuals of."""
    return residual if tails is None else tails * torch.sinh(residual / tails)


def largest_residual(tails: float | None) -> float:
    """Return the residual of a target that lies `LARGEST_DISTANCE` spreads from the mean."""
    return float(compress(torch.tensor(LARGEST_DISTANCE), tails))


class ConditionalBase(nn.Module):
    """A regression network with a spread per dimension.

    Args:
        context_dim: size of the context.
        dim: size of the target.
        widths: hidden layers.
        gates: how many units of the first layer are gated.
        tails: spreads from the mean beyond which a residual counts by its logarithm; None to count it as it is.
    """

    def __init__(
        self, context_dim: int, dim: int, widths: Sequence[int], gates: int = 0, tails: float | None = None
    ) -> None:
        super().__init__()
        self.tails = tails
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
        return Conditional(self.mean(features), log_scale, features, self.tails)


def mean_loss(error: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return what the mean is trained by: the distance of its errors."""
    return distance(error, ROUNDING)


def conditional_loss(found: Conditional, target: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return `mean_loss` plus the negative log likelihood of the spread: the standard deviation of a Laplace density.

    A Gaussian's is ruled by the few errors far out: most others then lie well inside of it.
    """
    error = target - found.mean
    fixed = error.detach()
    likelihood = found.log_scale + math.sqrt(2.0) * (fixed * torch.exp(-found.log_scale)).abs()
    return mean_loss(error) + likelihood.mean()
