"""The networks of the flow: x_t, t and the context of a transition to a prediction of the shape of x_t.

Each network splits its work three ways, because a solver calls it many times with one context: `embed_context` holds
all that depends on the context alone (once per call), `embed_time` all that depends on the time alone (one row per
step), and `combine` the rest. `forward` does all three at once for training.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from invdyn.errors import ConfigError
from invdyn.models.networks import hidden_layer

NetworkKind = Literal["unet", "film", "mlp"]


class VelocityNetwork(nn.Module, ABC):
    """A network of (x_t, t, context)."""

    output: nn.Module

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch 1"], context: Float[Tensor, "batch context"]
    ) -> Float[Tensor, "batch dim"]:
        """Return the prediction at x_t = `x`."""

    @abstractmethod
    def embed_context(self, context: Float[Tensor, "batch context"]) -> Float[Tensor, "batch embedding"]:
        """Return the share of the context in the embedding that `combine` takes."""

    @abstractmethod
    def embed_time(self, t: Float[Tensor, "times 1"]) -> Float[Tensor, "times embedding"]:
        """Return the share of the time; it adds to that of the context."""

    @abstractmethod
    def combine(
        self, x: Float[Tensor, "*samples batch dim"], embedding: Float[Tensor, "batch embedding"]
    ) -> Float[Tensor, "*samples batch dim"]:
        """Return the prediction from x_t and embed_context(context) + embed_time(t), shared by all samples."""

    def last_layer(self) -> nn.Linear:
        """Return the layer that the prediction comes from."""
        layer = self.output[-1] if isinstance(self.output, nn.Sequential) else self.output
        assert isinstance(layer, nn.Linear)
        return layer


class UNetVelocity(VelocityNetwork):
    """The reference network: a U-Net of fully connected levels, conditioned at every level.

    Time (Gaussian Fourier features) and context each become an embedding of `embed_dim`; their sum, projected to the
    width of each level, joins the input of the encoder and of the decoder block of that level.

    Args:
        dim: size of x_t.
        context_dim: size of the context.
        embed_dim: size of the time and context embeddings, even.
        widths: width of each level, top first.
    """

    def __init__(self, dim: int, context_dim: int, embed_dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        self.frequencies = nn.Parameter(16.0 * torch.randn(embed_dim // 2))
        self.time_embedding = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim),
            nn.Mish(),
            nn.LayerNorm(4 * embed_dim),
            nn.Linear(4 * embed_dim, embed_dim),
            nn.LayerNorm(embed_dim),
        )
        self.context_embedding = nn.Sequential(
            nn.Linear(context_dim, embed_dim),
            nn.SiLU(),
            nn.LayerNorm(embed_dim),
            nn.Linear(embed_dim, embed_dim),
            nn.LayerNorm(embed_dim),
        )
        # One matrix for the projections of all levels: the same weights as one Linear per level, in a single product.
        self.projection = nn.Linear(embed_dim, sum(widths))
        self.input = nn.Sequential(nn.Linear(dim, widths[0]), nn.LayerNorm(widths[0]))
        inputs = [widths[0], *widths]
        self.encoder = nn.ModuleList(_block(inputs[i] + width, width) for i, width in enumerate(widths))
        above = [*widths[1:], widths[-1]]
        self.decoder = nn.ModuleList(_block(above[i] + 2 * width, width) for i, width in enumerate(widths))
        self.output = nn.Sequential(nn.LayerNorm(widths[0]), nn.Linear(widths[0], dim))

    def forward(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch 1"], context: Float[Tensor, "batch context"]
    ) -> Float[Tensor, "batch dim"]:
        """Return the prediction at x_t = `x`."""
        embedding = self._time(t) + self.context_embedding(context)
        return self.combine(x, self.projection(embedding))

    def embed_context(self, context: Float[Tensor, "batch context"]) -> Float[Tensor, "batch embedding"]:
        """Return the projections of the context embedding to all levels, with their bias."""
        embedding: Tensor = self.projection(self.context_embedding(context))
        return embedding

    def embed_time(self, t: Float[Tensor, "times 1"]) -> Float[Tensor, "times embedding"]:
        """Return the projections of the time embedding to all levels."""
        return functional.linear(self._time(t), self.projection.weight)

    def combine(
        self, x: Float[Tensor, "*samples batch dim"], embedding: Float[Tensor, "batch embedding"]
    ) -> Float[Tensor, "*samples batch dim"]:
        """Return the prediction from x_t and the sum of both embeddings."""
        levels = torch.split(embedding.expand(*x.shape[:-1], -1), self.widths, dim=-1)
        h = self.input(x)
        skips = []
        for block, level in zip(self.encoder, levels, strict=True):
            h = block(torch.cat([h, level], dim=-1))
            skips.append(h)
        for index in reversed(range(len(levels))):
            h = self.decoder[index](torch.cat([h, skips[index], levels[index]], dim=-1))
        result: Tensor = self.output(h)
        return result

    def _time(self, t: Tensor) -> Tensor:
        angle = t * (2 * math.pi * self.frequencies)
        embedding: Tensor = self.time_embedding(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return embedding


class TimeFeatures(nn.Module):
    """sin and cos of t at frequencies from pi to 8 pi.

    The fields of a flow vary slowly in time, and features that vary fast are noise to be averaged out (Gaussian Fourier
    features of scale 16 cost an order of magnitude in error at equal training).

    Args:
        embed_dim: number of features, even.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        frequencies = math.pi * 2.0 ** torch.linspace(0.0, 3.0, embed_dim // 2)
        self.register_buffer("frequencies", frequencies.repeat(2), persistent=False)
        phases = torch.tensor([0.0, math.pi / 2]).repeat_interleave(embed_dim // 2)
        self.register_buffer("phases", phases, persistent=False)

    def forward(self, t: Float[Tensor, "times 1"]) -> Float[Tensor, "times features"]:
        """Return the features of each time."""
        return torch.addcmul(self.phases, t, self.frequencies).sin_()


class MLPVelocity(VelocityNetwork):
    """A plain MLP on [context, x_t, time features].

    Args:
        dim: size of x_t.
        context_dim: size of the context.
        embed_dim: number of time features, even.
        widths: width of each hidden layer.
    """

    def __init__(self, dim: int, context_dim: int, embed_dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [context_dim, dim, embed_dim]
        self.first = hidden_layer(sum(self.sizes), widths[0])
        self.hidden = nn.ModuleList(hidden_layer(before, after) for before, after in pairwise(widths))
        self.output = nn.Linear(widths[-1], dim)
        self.time = TimeFeatures(embed_dim)

    def forward(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch 1"], context: Float[Tensor, "batch context"]
    ) -> Float[Tensor, "batch dim"]:
        """Return the prediction at x_t = `x`."""
        return self._after_first(self.first(torch.cat([context, x, self.time(t)], dim=1)))

    def embed_context(self, context: Float[Tensor, "batch context"]) -> Float[Tensor, "batch embedding"]:
        """Return the share of the context in the first layer, with its bias."""
        weight, _, _ = torch.split(self.first.weight, self.sizes, dim=1)
        return functional.linear(context, weight, self.first.bias)

    def embed_time(self, t: Float[Tensor, "times 1"]) -> Float[Tensor, "times embedding"]:
        """Return the share of the time in the first layer."""
        _, _, weight = torch.split(self.first.weight, self.sizes, dim=1)
        return functional.linear(self.time(t), weight)

    def combine(
        self, x: Float[Tensor, "*samples batch dim"], embedding: Float[Tensor, "batch embedding"]
    ) -> Float[Tensor, "*samples batch dim"]:
        """Return the prediction from x_t and the sum of both embeddings."""
        _, weight, _ = torch.split(self.first.weight, self.sizes, dim=1)
        return self._after_first(functional.linear(x, weight).add_(embedding))

    def _after_first(self, h: Tensor) -> Tensor:
        for layer in self.hidden:
            h = layer(functional.silu(h))
        result: Tensor = self.output(functional.silu(h))
        return result


class FiLMVelocity(VelocityNetwork):
    """A residual MLP on [x_t, time features] whose blocks are scaled and shifted by the context.

    Source: Perez, Strub, de Vries, Dumoulin & Courville, "FiLM: Visual Reasoning with a General Conditioning Layer"
    (2018).

    Args:
        dim: size of x_t.
        context_dim: size of the context.
        embed_dim: number of time features, even.
        widths: width of each block; all equal, since a block adds to its input.

    Raises:
        ConfigError: when the widths differ.
    """

    def __init__(self, dim: int, context_dim: int, embed_dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        width = widths[0]
        if set(widths) != {width}:
            raise ConfigError(f"down_dims of network film must all be equal, got {list(widths)}")
        self.width, self.num_blocks = width, len(widths)
        self.time = TimeFeatures(embed_dim)
        self.time_embedding = nn.Linear(embed_dim, width, bias=False)
        self.context_embedding = nn.Sequential(
            nn.Linear(context_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2 * width * len(widths)),
        )
        self.input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in widths)
        self.output = nn.Linear(width, dim)

    def forward(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch 1"], context: Float[Tensor, "batch context"]
    ) -> Float[Tensor, "batch dim"]:
        """Return the prediction at x_t = `x`."""
        return self.combine(x, self.embed_context(context) + self.embed_time(t))

    def embed_context(self, context: Float[Tensor, "batch context"]) -> Float[Tensor, "batch embedding"]:
        """Return the scales and shifts of all blocks."""
        return functional.pad(self.context_embedding(context), (0, self.width))

    def embed_time(self, t: Float[Tensor, "times 1"]) -> Float[Tensor, "times embedding"]:
        """Return the share of the time in the input, behind zeros for the scales and shifts."""
        return functional.pad(self.time_embedding(self.time(t)), (2 * self.width * self.num_blocks, 0))

    def combine(
        self, x: Float[Tensor, "*samples batch dim"], embedding: Float[Tensor, "batch embedding"]
    ) -> Float[Tensor, "*samples batch dim"]:
        """Return the prediction from x_t and the sum of both embeddings."""
        *modulations, time = embedding.split(self.width, dim=-1)
        h = self.input(x) + time
        for block, scale, shift in zip(self.blocks, modulations[::2], modulations[1::2], strict=True):
            h = h + block(functional.silu(torch.addcmul(h + shift, h, scale)))
        result: Tensor = self.output(functional.silu(h))
        return result


NETWORKS: dict[NetworkKind, type[UNetVelocity | FiLMVelocity | MLPVelocity]] = {
    "unet": UNetVelocity,
    "film": FiLMVelocity,
    "mlp": MLPVelocity,
}


def _block(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(inputs),
        nn.Linear(inputs, width),
        nn.SiLU(),
        nn.LayerNorm(width),
        nn.Linear(width, width),
        nn.LayerNorm(width),
    )
