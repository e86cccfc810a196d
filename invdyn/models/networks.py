"""Plain networks that several models share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from invdyn.errors import ConfigError


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
    layers: list[nn.Module] = []
    for before, after in pairwise((inputs, *widths)):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
