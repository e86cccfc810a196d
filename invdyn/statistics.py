"""Moments of transitions in one pass: everything that normalisation and the linear inverse need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from threadpoolctl import ThreadpoolController

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
    features = np.empty((len(state), state.shape[1] + next_state.shape[1]))
    write_features(state, next_state, features)
    return features


def write_features(
    state: Float[np.ndarray, "rows window_dim"],
    next_state: Float[np.ndarray, "rows state_dim"],
    out: Float[np.ndarray, "rows columns"],
) -> None:
    """Write `transition_features` into the first columns of `out` (float64), without temporary arrays."""
    dim = next_state.shape[1]
    past = [state[:, first : first + dim] for first in range(0, state.shape[1], dim)][::-1]
    out[:, :dim] = past[0]
    for index, (later, earlier) in enumerate(zip([next_state, *past], past, strict=False)):
        # s' - s comes last, after the differences between past states.
        column = len(past) if index == 0 else index
        np.subtract(later, earlier, out=out[:, column * dim : (column + 1) * dim], dtype=np.float64)


CHUNK_BYTES = 512 * 1024
"""Rows are worked on in chunks of this size: they stay in a core's cache."""


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

    @classmethod
    def of_transitions(
        cls,
        state: Float[np.ndarray, "rows window_dim"],
        action: Float[np.ndarray, "rows *horizon action_dim"],
        next_state: Float[np.ndarray, "rows state_dim"],
    ) -> Moments:
        """Compute the moments of [transition features, action] in one pass over the rows; at least one row.

        Sums are taken about the mean of the first chunk, which loses no digits as long as it is within a few standard
        deviations of the mean of all rows.

        Args:
            state: (rows, (history + 1) * state_dim), oldest first.
            action: (rows, [horizon,] action_dim).
            next_state: (rows, state_dim).
        """
        action = action.reshape(len(action), -1)
        columns = state.shape[1] + next_state.shape[1] + action.shape[1]
        chunk_rows = max(1, CHUNK_BYTES // (8 * (columns + 1)))
        buffer = np.ones((chunk_rows, columns + 1))  # the last column stays 1: its products are the sums
        shift = np.zeros(columns)
        products = np.zeros((columns + 1, columns + 1))
        low, high = np.full(columns, np.inf), np.full(columns, -np.inf)
        with _blas().limit(limits=1, user_api="blas"):  # the bits must not depend on how many threads there are
            for first in range(0, len(state), chunk_rows):
                chunk = slice(first, first + chunk_rows)
                rows = buffer[: len(state[chunk])]
                write_features(state[chunk], next_state[chunk], rows)
                values = rows[:, :columns]
                values[:, columns - action.shape[1] :] = action[chunk]
                np.minimum(low, values.min(axis=0), out=low)
                np.maximum(high, values.max(axis=0), out=high)
                if first == 0:
                    shift = values.mean(axis=0)
                values -= shift
                products += rows.T @ rows
        count, sums = len(state), products[columns, :columns]
        comoment = products[:columns, :columns] - np.outer(sums, sums) / count
        np.fill_diagonal(comoment, np.maximum(np.diag(comoment), 0.0))
        return cls(count, shift + sums / count, comoment, low, high)

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


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Merge in the given order: the same parts in the same order give the same bits."""
    return reduce(Moments.merge, parts)
