"""Actions that cannot leave an interval: samples are put back inside, and the density says how.

A change of variables (logit, arctanh) would do so smoothly, but sends actions on a bound to infinity, and recorded
actions often lie on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from invdyn.errors import ConfigError

Bound = float | Sequence[float]
ActionBounds = tuple[Bound, Bound]
BoundRule = Literal["reflect", "clip"]

MAX_REFLECTED_DIMS = 4
"""The density of reflected samples is a sum over 3^dims images."""


class Bounds(torch.nn.Module):
    """An interval per action, and what becomes of samples outside it.

    Args:
        action_bounds: (low, high), each one number or one per action dimension, in physical units.
        rule: "reflect" folds samples back at the bound: right where actions are spread up to it. "clip" moves them onto
            it: right where recorded actions lie on it.
        action_dim: size of one action.
        horizon: number of actions.

    Raises:
        ConfigError: when the bounds are no finite intervals of `action_dim` numbers.
    """

    low: Tensor
    high: Tensor

    def __init__(self, action_bounds: ActionBounds, rule: BoundRule, action_dim: int, horizon: int) -> None:
        super().__init__()
        if rule not in ("reflect", "clip"):
            raise ConfigError(f"at_bounds must be reflect or clip, got {rule!r}")
        sides = [np.atleast_1d(np.asarray(side, dtype=np.float32)) for side in action_bounds]
        if any(side.shape not in ((1,), (action_dim,)) for side in sides):
            raise ConfigError(
                f"action_bounds must be [low, high], each one number or {action_dim}, got {list(action_bounds)}"
            )
        target_dim = horizon * action_dim
        low, high = (torch.from_numpy(np.tile(side, target_dim // len(side))) for side in sides)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all() and (low < high).all()):
            raise ConfigError(f"action_bounds must be finite with low < high, got {list(action_bounds)}")
        self.rule = rule
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    def forward(self, action: Float[Tensor, "*samples dims"]) -> Float[Tensor, "*samples dims"]:
        """Return actions inside the bounds."""
        if self.rule == "reflect":
            width = self.high - self.low
            action = self.low + width - (torch.remainder(action - self.low, 2 * width) - width).abs()
        return action.clamp(self.low, self.high)

    def contains(self, action: Float[Tensor, "batch dims"]) -> Bool[Tensor, " batch"]:
        """Return whether each action lies inside or on the bounds."""
        return ((action >= self.low) & (action <= self.high)).all(dim=1)

    def on_bound(self, action: Float[Tensor, "batch dims"]) -> Bool[Tensor, " batch"]:
        """Return whether some dimension of each action lies exactly on a bound."""
        return ((action == self.low) | (action == self.high)).any(dim=1)

    def images(self, action: Float[Tensor, "batch dims"]) -> list[Float[Tensor, "batch dims"]]:
        """Return every point that reflection at one bound per dimension carries to `action`, itself first.

        Points more than a whole interval outside are left out.

        Raises:
            ConfigError: with more than `MAX_REFLECTED_DIMS` dimensions.
        """
        dims = action.shape[1]
        if dims > MAX_REFLECTED_DIMS:
            raise ConfigError(
                f"log_prob of reflected actions needs {MAX_REFLECTED_DIMS} dimensions or fewer, got {dims}; train with "
                "at_bounds: clip, or without action_bounds"
            )
        choices = torch.stack([action, 2 * self.low - action, 2 * self.high - action])
        columns = torch.arange(dims)
        return [choices[list(which), :, columns].T for which in itertools.product(range(3), repeat=dims)]
