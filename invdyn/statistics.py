"""Moments of transitions in one pass: everything that normalisation and the linear inverse need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

FloatArray = Float[np.ndarray, "..."]


def transition_features(
    state: Float[np.ndarray, "rows window_dim"], next_state: Float[np.ndarray, "rows state_dim"]
) -> Float[np.ndarray, "rows features"]:
    """Return [s, past differences, s' - s] in float64: what every model conditions on.

    `state` holds history + 1 states side by side, oldest first, so its last `state_dim` columns are the current state.
    Differences of neighbouring states are formed in float64 because consecutive states nearly cancel.

    Args:
        state: (rows, (history + 1) * state_dim).
        next_state: (rows, state_dim).

    Returns:
        (rows, (history + 2) * state_dim) float64: the current state, then s_t - s_{t-1} back to the oldest pair, then
        next_state - s_t.
    """
    state_dim = next_state.shape[1]
    window = state.astype(np.float64)
    current = window[:, -state_dim:]
    past = window[:, state_dim:] - window[:, :-state_dim]
    newest_first = np.split(past, past.shape[1] // state_dim or 1, axis=1)[::-1]
    return np.concatenate([current, *newest_first, next_state - current], axis=1)


@dataclass(frozen=True)
class Moments:
    """Count, mean, co-moments and range of the columns [features, action] of a set of rows.

    Attributes:
        count: number of rows.
        mean: (columns,) float64.
        comoment: (columns, columns) float64, the sum over rows of outer(x - mean, x - mean).
        minimum: (columns,) float64.
        maximum: (columns,) float64.
    """

    count: int
    mean: FloatArray
    comoment: FloatArray
    minimum: FloatArray
    maximum: FloatArray

    @classmethod
    def of_rows(cls, rows: Float[np.ndarray, "rows columns"]) -> Moments:
        """Compute the moments of (rows, columns) float64 values; at least one row."""
        mean = rows.mean(axis=0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred, rows.min(axis=0), rows.max(axis=0))

    def merge(self, other: Moments) -> Moments:
        """Combine two disjoint sets of rows exactly.

        Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
        (1979), eq. 2.1, for the full co-moment matrix.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        comoment = self.comoment + other.comoment + np.outer(delta, delta) * (self.count * other.count / count)
        low, high = np.minimum(self.minimum, other.minimum), np.maximum(self.maximum, other.maximum)
        return Moments(count, mean, comoment, low, high)

    @property
    def std(self) -> FloatArray:
        """Population standard deviation of each column, (columns,)."""
        return np.sqrt(np.diag(self.comoment) / self.count)

    @property
    def covariance(self) -> FloatArray:
        """Population covariance, (columns, columns)."""
        return self.comoment / self.count

    def to_json(self) -> dict[str, Any]:
        """Return plain lists; Python floats keep every bit of a float64."""
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "min": self.minimum.tolist(),
            "max": self.maximum.tolist(),
            "comoment": self.comoment.tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Moments:
        """Rebuild from `to_json`."""

        def array(value: ArrayLike) -> FloatArray:
            return np.asarray(value, dtype=np.float64)

        return cls(
            int(values["count"]),
            array(values["mean"]),
            array(values["comoment"]),
            array(values["min"]),
            array(values["max"]),
        )


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Merge in the given order: the same parts in the same order give the same bits."""
    return reduce(Moments.merge, parts)
