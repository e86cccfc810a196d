"""Plain networks that several models share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from invdyn.errors import ConfigError

HIDDEN_GAIN = 2.0
"""With PyTorch's weights a network is nearly linear at first, and blind to what a linear base leaves (docs/flow.md)."""


def hidden_layer(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer whose weights are drawn twice as far out as PyTorch draws them.

    Example:
        >>> 0.9 < hidden_layer(100, 1000).weight.abs().max() * 10 / HIDDEN_GAIN <= 1
        tensor(True)
    """
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.mul_(HIDDEN_GAIN)
    return layer


class GatedSiLU(nn.Module):
    """SiLU whose last units take their gate from columns of their own: one linear map times the sigmoid of another.

    SiLU is x * sigmoid(x); a gated linear unit is x * sigmoid(y), which grows no faster.

    Source: Dauphin, Fan, Auli & Grangier, "Language Modeling with Gated Convolutional Networks" (2017).

    Args:
        gates: number of gated units, and of the columns behind all units that gate them.

    Example:
        >>> GatedSiLU(1)(torch.tensor([[2.0, 3.0, -50.0]]))  # sigmoid(-50) closes the second
        tensor([[1.7616e+00, 5.7862e-22]])
    """

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.gates = gates

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch units"]:
        """Return the units: `gates` fewer than columns."""
        plain, gated, gate = x.split([x.shape[-1] - 2 * self.gates, self.gates, self.gates], dim=-1)
        return torch.cat([functional.silu(plain), gated * gate.sigmoid()], dim=-1)


def hidden_layers(inputs: int, widths: Sequence[int], gates: int = 0) -> list[nn.Module]:
    """Return fully connected layers, each with the SiLU that follows it; the first has some gated units."""
    layers: list[nn.Module] = [hidden_layer(inputs, widths[0] + gates), GatedSiLU(gates) if gates else nn.SiLU()]
    for before, after in pairwise(widths):
        layers += [hidden_layer(before, after), nn.SiLU()]
    return layers


def distance(error: Float[Tensor, "batch dim"], rounding: float) -> Float[Tensor, ""]:
    """Return the mean length of errors.

    The rows with the largest errors rule their squares; by the length all rows pull alike.

    Args:
        error: (batch, dim).
        rounding: errors far below it count by their square: else they would pull as hard near 0 as anywhere.

    Example:
        >>> distance(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), rounding=0.0)
        tensor(2.5000)
    """
    return (error.square().sum(dim=1) + rounding**2).sqrt().mean()


def build_mlp(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Return a fully connected network with SiLU between its layers.

    Args:
        inputs: columns in.
        widths: of the hidden layers.
        outputs: columns out.

    Raises:
        ConfigError: when there is no hidden layer, or a width is below 1.

    Example:
        >>> [tuple(weight.shape) for weight in build_mlp(3, (8, 4), 2).parameters() if weight.dim() == 2]
        [(8, 3), (4, 8), (2, 4)]
    """
    if not widths or min(widths) < 1:
        raise ConfigError(f"down_dims must be one or more positive widths, got {list(widths)}")
    return nn.Sequential(*hidden_layers(inputs, widths), nn.Linear(widths[-1], outputs))
