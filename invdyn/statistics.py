"""Moments of transitions in one pass: everything that normalisation and the linear inverse need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
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

COLUMN_ALIGNMENT = 8
"""Columns of a chunk are padded to a multiple of this: the matrix product is then a tenth faster."""

RANGE_FOLD = 32
"""Rows laid side by side when extremes are taken: long rows are what numpy's reductions are fast on."""

CONSTANT_TOLERANCE = 1e-7
"""A column whose standard deviation is below this share of its largest value is float32 rounding, not a signal."""

FAR_FROM_ZERO = 100.0
"""A mean of this many standard deviations would cost the sums digits: they are then taken about it."""


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
        """Compute the moments of [transition features, action] of rows; see `RunningMoments`.

        Args:
            state: (rows, (history + 1) * state_dim), oldest first; at least one row.
            action: (rows, [horizon,] action_dim).
            next_state: (rows, state_dim).
        """
        running = RunningMoments()
        with one_blas_thread():
            running.add(state, action, next_state)
        found = running.moments()
        assert found is not None
        return found

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
    def varies(self) -> Bool[np.ndarray, "columns"]:
        """Whether each column varies by more than its rounding, (columns,)."""
        return np.asarray(self.std > CONSTANT_TOLERANCE * np.maximum(np.abs(self.minimum), np.abs(self.maximum)))

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


class RunningMoments:
    """Moments of [features, action] of transitions that come in blocks, in one pass, in float64.

    Sums are taken about zero, or, where a column of the first chunk lies far from zero for its spread (as a constant
    does), about the means of that chunk: no digits are lost while those are within a few deviations of the mean.
    The same blocks in the same order give the same bits, under `one_blas_thread`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._buffer: FloatArray | None = None

    def add(
        self,
        state: Float[np.ndarray, "rows window_dim"],
        action: Float[np.ndarray, "rows *horizon action_dim"],
        next_state: Float[np.ndarray, "rows state_dim"],
    ) -> None:
        """Add a block of rows.

        Args:
            state: (rows, (history + 1) * state_dim), oldest first.
            action: (rows, [horizon,] action_dim).
            next_state: (rows, state_dim).
        """
        if not len(state):
            return
        action = action.reshape(len(action), -1)
        buffer = self._prepare(state.shape[1] + next_state.shape[1], action.shape[1])
        for first in range(0, len(state), len(buffer)):
            chunk = slice(first, first + len(buffer))
            self._add_chunk(buffer[: len(state[chunk])], state[chunk], action[chunk], next_state[chunk])
        self.count += len(state)

    def moments(self) -> Moments | None:
        """Return the moments of all rows added; None when there are none."""
        if not self.count:
            return None
        columns, sums = self._columns, self._products[self._columns, : self._columns]
        comoment = self._products[:columns, :columns] - np.outer(sums, sums) / self.count
        np.fill_diagonal(comoment, np.maximum(np.diag(comoment), 0.0))
        mean = self._shift + sums / self.count
        return Moments(self.count, mean, comoment, self._low[:columns].copy(), self._high[:columns].copy())

    def _prepare(self, num_features: int, action_dim: int) -> FloatArray:
        """Return the chunk that rows are worked on in: [features, action, 1, zeros]."""
        if self._buffer is None:
            self._num_features, self._columns = num_features, num_features + action_dim
            width = -(-(self._columns + 1) // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT
            self._buffer = np.zeros((max(1, CHUNK_BYTES // (8 * width)), width))
            self._buffer[:, self._columns] = 1.0  # its products are the sums
            self._products = np.zeros((width, width))
            self._low, self._high = np.full(width, np.inf), np.full(width, -np.inf)
            self._shift: FloatArray = np.zeros(self._columns)
            self._is_shifted = False
        return self._buffer

    def _add_chunk(
        self,
        rows: Float[np.ndarray, "rows width"],
        state: Float[np.ndarray, "rows window_dim"],
        action: Float[np.ndarray, "rows actions"],
        next_state: Float[np.ndarray, "rows state_dim"],
    ) -> None:
        write_features(state, next_state, rows)
        rows[:, self._num_features : self._columns] = action
        np.minimum(self._low, _fold(rows, np.minimum), out=self._low)
        np.maximum(self._high, _fold(rows, np.maximum), out=self._high)
        values = rows[:, : self._columns]
        if self.count == 0 and not self._products.any():
            mean, std = values.mean(axis=0), values.std(axis=0)
            self._is_shifted = bool((np.abs(mean) > FAR_FROM_ZERO * std).any())
            if self._is_shifted:
                self._shift = mean
        if self._is_shifted:
            values -= self._shift
        self._products += rows.T @ rows


def _fold(rows: Float[np.ndarray, "rows width"], extreme: np.ufunc) -> Float[np.ndarray, " width"]:
    """Return the least or greatest value of each column of contiguous rows."""
    whole = len(rows) // RANGE_FOLD * RANGE_FOLD
    found = extreme.reduce(rows[whole:], axis=0, initial=None) if whole < len(rows) else rows[0]
    if whole:
        wide = extreme.reduce(rows[:whole].reshape(whole // RANGE_FOLD, -1), axis=0)
        found = extreme(found, extreme.reduce(wide.reshape(RANGE_FOLD, -1), axis=0))
    result: FloatArray = found
    return result


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS on one thread: the bits must not depend on how many there are."""
    with _blas().limit(limits=1, user_api="blas"):
        yield


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Merge in the given order: the same parts in the same order give the same bits."""
    return reduce(Moments.merge, parts)
