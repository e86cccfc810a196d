"""Baseline: the actions of the nearest training rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from invdyn.errors import ConfigError
from invdyn.models.base import BaseKind, Noise
from invdyn.models.fitted import FittedModel, chunks_of
from invdyn.models.mixture_density import pick

_CHUNK_ELEMENTS = 2**24
_SMALLEST_SQUARE = 1e-20


class NearestNeighbours(FittedModel):
    """The normalised residuals of the k nearest training rows, weighted by a Gaussian of the distance.

    Distances are between standardised features; the width of the Gaussian is half the distance of the k-th. A sample is
    the residual of one neighbour, drawn by its weight, so where several actions are right the samples are several.
    Until it is fitted, its one row has all zeros.

    Args:
        state_dim: size of one state.
        action_dim: size of one action.
        num_neighbours: k.
        max_fit_rows: training rows to keep at most, evenly spaced; all of them lie in the checkpoint.
        base: "linear" to look up the whitened residual of the ridge solution.
        normalize: standardise the features.
        history: number of past states.
        horizon: number of actions predicted.

    Raises:
        ConfigError: when a number is below 1.
    """

    learned_buffers = ("row_context", "row_target")
    row_context: Tensor
    row_target: Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        num_neighbours: int = 8,
        *,
        max_fit_rows: int = 200_000,
        base: BaseKind = "linear",
        normalize: bool = True,
        history: int = 0,
        horizon: int = 1,
    ) -> None:
        super().__init__(state_dim, action_dim, history=history, horizon=horizon, base=base, normalize=normalize)
        if num_neighbours < 1 or max_fit_rows < 1:
            raise ConfigError(
                f"num_neighbours and max_fit_rows must be 1 or more, got {num_neighbours} and {max_fit_rows}"
            )
        self.num_neighbours, self.max_fit_rows = num_neighbours, max_fit_rows
        self.register_buffer("row_context", torch.zeros(1, self.context_dim))
        self.register_buffer("row_target", torch.zeros(1, self.target_dim))

    @override
    def fit(self, context: Float[Tensor, "rows context"], target: Float[Tensor, "rows target"]) -> None:
        """Keep the rows."""
        self.row_context, self.row_target = context, target

    @override
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of the weighted mean of the neighbours; `noise` is empty."""
        weight, found = self.neighbours(context)
        return functional.mse_loss((weight[..., None] * self.row_target[found]).sum(dim=1), target)

    @property
    @override
    def noise_dim(self) -> int:
        """One column: it picks the neighbour."""
        return 1

    def neighbours(self, context: Float[Tensor, "batch context"]) -> tuple[Float[Tensor, "batch k"], Tensor]:
        """Return weight (summing to 1) and row number of each neighbour, both (batch, k), nearest first."""
        chunks = chunks_of(context, _CHUNK_ELEMENTS // len(self.row_context))
        weight, found = zip(*(self._chunk_neighbours(chunk) for chunk in chunks), strict=True)
        return torch.cat(weight), torch.cat(found)

    @override
    def _targets_from_noise(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        weight, found = self.neighbours(context)
        chosen = found.expand(noise.shape[0], -1, -1).gather(2, pick(weight, noise[..., 0])[..., None])[..., 0]
        return self.row_target[chosen]

    def _chunk_neighbours(self, context: Tensor) -> tuple[Tensor, Tensor]:
        rows, count = self.row_context, min(self.num_neighbours, len(self.row_context))
        # |row|^2 - 2 row query: but for the query's own square, so the same order. One matrix product.
        order = torch.addmm(rows.square().sum(dim=1), context, rows.T, alpha=-2.0)
        found = order.topk(count, dim=1, largest=False).indices
        # The product loses the digits of small distances: weights come from the differences.
        squared, nearest_first = (rows[found] - context[:, None]).square().sum(dim=2).sort(dim=1)
        weight = (-2.0 * squared / squared[:, -1:].clamp_min(_SMALLEST_SQUARE)).exp()
        return weight / weight.sum(dim=1, keepdim=True), found.gather(1, nearest_first)
