"""Plain networks that several models share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

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


def hidden_layers(inputs: int, widths: Sequence[int]) -> list[nn.Module]:
    """Return fully connected layers, each with the SiLU that follows it."""
    layers: list[nn.Module] = []
    for before, after in pairwise((inputs, *widths)):
        layers += [hidden_layer(before, after), nn.SiLU()]
    return layers


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
