"""What storing states as float32 takes from s' - s: a large offset leaves few digits for what moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

MAX_SHARE = 0.01
"""Rounding of s' - s, in its standard deviations, from which on a dimension has lost something."""

ADVICE = (
    "subtract a constant from such a dimension before it is recorded, or leave it out where its motion does not matter"
)

PerDim = Float[np.ndarray, "dim"]


@dataclass(frozen=True)
class Rounding:
    """How finely float32 holds the states, and what it has to hold.

    Attributes:
        size: (dim,) root mean square of each dimension of the state.
        step_std: (dim,) standard deviation of s' - s.
    """

    size: PerDim
    step_std: PerDim

    @property
    def share(self) -> PerDim:
        """Standard deviation of the rounding of s' - s over that of s' - s, (dim,); 0 where nothing moves."""
        # Each state is off by up to half a spacing either way, evenly: a variance of spacing^2 / 12, twice (less where
        # neighbouring states round to one value, but then nearly all is lost).
        error = np.spacing(self.size.astype(np.float32)).astype(np.float64) / np.sqrt(6.0)
        share: PerDim = np.divide(error, self.step_std, out=np.zeros_like(error), where=self.step_std > 0)
        return share

    @property
    def lossy(self) -> Int[np.ndarray, "lossy"]:
        """The dimensions that lose something."""
        return np.flatnonzero(self.share > MAX_SHARE)

    def describe_worst(self) -> str:
        """Return in words what the dimension that loses most has lost."""
        worst = int(self.share.argmax())
        return (
            f"by up to {self.share[worst]:.2g} times its standard deviation, where values of {self.size[worst]:.3g} "
            f"move by {self.step_std[worst]:.2g} a step"
        )
