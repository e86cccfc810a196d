"""How well states tell the action: the linear inverse for any window and any shift, from one pass over the rows.

The rows of a sample are reduced once to the moments of [s_t, differences of neighbouring states around t, actions].
The features of every gap, history and shift are sums of those columns, so that each further question costs a small
matrix product. Differences are formed before anything is summed: consecutive states nearly cancel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from invdyn.doctor.sample import Sample
from invdyn.models.linear_base import RELATIVE_RIDGE
from invdyn.statistics import Moments
from invdyn.transitions.filters import constant_columns
from invdyn.transitions.store import spread_rows
from invdyn.transitions.windows import Window, ranges

MAX_FOLDS = 5
RIDGES = (RELATIVE_RIDGE, 1e-5, 1e-3, 1e-1)
MAX_VALUES = 12_000_000
"""Numbers in the matrix of rows, float64: about 100 MB."""

FloatArray = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class Rows:
    """Rows around t: the state, differences of neighbouring states, and actions.

    Attributes:
        values: (rows, columns) float64: s_t; s_{offsets[i+1]} - s_{offsets[i]} for each i; a_t .. a_{t+horizon-1}.
        offsets: the offsets from t whose states are known, ascending, 0 among them.
        state_dim: numbers in a state that vary.
        num_targets: numbers in the actions of a row.
        fold: (rows,) which part of the sample a row is in; parts share no episode where there are several.
        num_folds: number of parts.
    """

    values: FloatArray
    offsets: tuple[int, ...]
    state_dim: int
    num_targets: int
    fold: Int[np.ndarray, "rows"]
    num_folds: int

    @property
    def target(self) -> Float[np.ndarray, "rows targets"]:
        """The actions of each row."""
        return self.values[:, -self.num_targets :]

    @cached_property
    def fold_moments(self) -> list[Moments]:
        """Moments of the rows of each fold."""
        return [Moments.of_rows(self.values[self.fold == fold]) for fold in range(self.num_folds)]

    def window_blocks(self, window: Window) -> Float[np.ndarray, "blocks known"]:
        """Return how [s_t, past differences, s_{t+gap} - s_t], a window's features, are summed from the columns."""
        past = [self._difference(-i - 1, -i) for i in range(window.history)]
        return np.stack([self._state(0), *past, self._difference(0, window.gap)])

    def shift_blocks(self, shift: int) -> Float[np.ndarray, "blocks known"]:
        """Return how the features of the step t + shift -> t + shift + 1 are summed from the columns."""
        return np.stack([self._state(shift), self._difference(shift, shift + 1)])

    def state_block(self, offset: int) -> Float[np.ndarray, "one known"]:
        """Return how s_{t+offset} is summed from the columns."""
        return self._state(offset)[None]

    def _state(self, offset: int) -> Float[np.ndarray, "known"]:
        now = np.zeros(len(self.offsets))
        now[0] = 1.0
        low, high = sorted((0, offset))
        block: Float[np.ndarray, "known"] = now + np.sign(offset) * self._difference(low, high)
        return block

    def _difference(self, low: int, high: int) -> Float[np.ndarray, "known"]:
        # offsets[i + 1] - offsets[i] is column block 1 + i.
        row = np.zeros(len(self.offsets))
        row[1 + self.offsets.index(low) : 1 + self.offsets.index(high)] = 1.0
        return row


def make_rows(sample: Sample, offsets: Iterable[int], horizon: int) -> Rows | None:
    """Return the rows for which all offsets lie in the episode, evenly thinned where there are too many.

    None where there are hardly any, or no state dimension or no action varies: there is nothing to fit.

    Args:
        sample: the episodes.
        offsets: offsets from t whose states are needed.
        horizon: actions per row.
    """
    known = tuple(sorted({0, *offsets}))
    window = Window(gap=max(known[-1], 1), horizon=horizon, history=-known[0])
    counts = window.num_rows(sample.num_states, sample.num_actions)
    now = ranges(sample.state_start + window.history, counts)
    act = ranges(sample.action_start + window.history, counts)
    columns = len(known) * sample.state.shape[1] + horizon * sample.action.shape[1]
    thin = spread_rows(len(now), MAX_VALUES // columns)
    if len(thin) < 2 * MAX_FOLDS:
        return None
    moving = sample.state[:, ~constant_columns(sample.state)]  # a constant dimension tells nothing, and costs its share
    episode = np.repeat(sample.number, counts)[thin]  # the same for all pieces of an episode that was cut
    now, act = now[thin], act[thin]
    states = [moving[now + offset] for offset in known]
    differences = [after - before for before, after in pairwise(states)]
    actions = sample.action[act[:, None] + np.arange(horizon)].reshape(len(act), -1)
    fold, num_folds = fold_of(episode)
    values = np.concatenate([states[known.index(0)], *differences, actions], axis=1)
    rows = Rows(values, known, moving.shape[1], actions.shape[1], fold, num_folds)
    return rows if rows.state_dim and _variance(rows).any() else None


def fold_of(episode: Int[np.ndarray, "rows"]) -> tuple[Int[np.ndarray, "rows"], int]:
    """Assign rows to at most `MAX_FOLDS` folds: by episode where there are several, else in contiguous stretches."""
    names, position = np.unique(episode, return_inverse=True)
    if len(names) > 1:
        folds = min(MAX_FOLDS, len(names))
        return position % folds, folds
    return np.arange(len(episode)) * MAX_FOLDS // len(episode), MAX_FOLDS


@dataclass(frozen=True)
class HeldOut:
    """A linear inverse for one fold, fitted on the others.

    Attributes:
        weights: for each of `RIDGES`, (features, targets).
        fitted: moments of [features, targets] of the other folds.
        held_out: moments of the fold itself.
    """

    weights: list[Float[np.ndarray, "features targets"]]
    fitted: Moments
    held_out: Moments

    @property
    def squared_errors(self) -> Float[np.ndarray, "ridges targets"]:
        """Sum of squared errors over the rows of the fold."""
        return np.stack([_squared_error(self.held_out, weight, self.fitted.mean) for weight in self.weights])


def fit_folds(rows: Rows, blocks: Float[np.ndarray, "blocks known"]) -> list[HeldOut]:
    """Fit the linear inverse once per fold, on the rows of all other folds.

    Args:
        rows: the rows.
        blocks: which features, from `window_blocks` or `shift_blocks`.
    """
    return [
        HeldOut(fit(fitted, rows.num_targets), fitted, held_out) for fitted, held_out in _leave_one_out(rows, blocks)
    ]


def unexplained(rows: Rows, folds: list[HeldOut]) -> Float[np.ndarray, "targets"]:
    """Return the share of each target's variance that the linear inverse leaves, on folds it was not fitted on.

    The ridge is the one of `RIDGES` that leaves least over all targets: few rows need a strong one.

    Returns:
        (targets,) mean squared error / variance; NaN for a constant target.
    """
    return least_share(rows, sum((fold.squared_errors for fold in folds), np.zeros(())), len(rows.values))


def least_share(rows: Rows, squared: Float[np.ndarray, "ridges targets"], count: int) -> Float[np.ndarray, "targets"]:
    """Return `squared` errors of `count` rows as shares of each target's variance, for the best ridge.

    At most 1: the mean action is always there to answer with.
    """
    variance = _variance(rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(variance > 0, squared / (variance * count), np.nan)
    best: FloatArray = np.minimum(min(shares, key=mean_share), 1.0)
    return best


def fit(moments: Moments, num_targets: int) -> list[Float[np.ndarray, "features targets"]]:
    """Return the weight of the linear inverse for each of `RIDGES`.

    With it, target = mean[-num_targets:] + (features - mean[:-num_targets]) @ weight.
    """
    std = moments.std
    inverse = np.divide(1.0, std, where=moments.varies, out=np.zeros_like(std))
    correlation = moments.covariance * np.outer(inverse, inverse)
    split = len(std) - num_targets
    eigenvalues, vectors = np.linalg.eigh(correlation[:split, :split])
    projected = vectors.T @ correlation[:split, split:]
    solutions = [vectors @ (projected / (np.maximum(eigenvalues, 0.0) + ridge)[:, None]) for ridge in RIDGES]
    return [inverse[:split, None] * solution * std[split:] for solution in solutions]


def block_features(
    rows: Rows, blocks: Float[np.ndarray, "blocks known"], chosen: Int[np.ndarray, "chosen"]
) -> FloatArray:
    """Return the features of the chosen rows, (chosen, blocks * state_dim)."""
    known = rows.values[chosen, : -rows.num_targets].reshape(len(chosen), -1, rows.state_dim)
    columns: FloatArray = np.matmul(blocks, known).reshape(len(chosen), -1)
    return columns


def unexplained_by_one_state(rows: Rows, shift: int) -> Float[np.ndarray, "targets"]:
    """Return the share of each target's variance left by a line through one dimension of s_{t+shift}.

    Each target has its own dimension, the one most correlated with it on the rows that the line is fitted on. An action
    that commands a position is told best by the position reached, whatever the other dimensions do.
    """
    squared = np.zeros((1, rows.num_targets))
    for fitted, held_out in _leave_one_out(rows, rows.state_block(shift)):
        squared += _squared_error(held_out, _single_weight(fitted, rows.num_targets), fitted.mean)
    return least_share(rows, squared, len(rows.values))


def _single_weight(moments: Moments, num_targets: int) -> Float[np.ndarray, "features targets"]:
    """Return the weight of the one most correlated feature of each target."""
    variance = np.diag(moments.comoment)[:-num_targets]
    cross = moments.comoment[:-num_targets, -num_targets:]
    slope = np.divide(cross, variance[:, None], where=variance[:, None] > 0, out=np.zeros_like(cross))
    chosen = (slope * cross).argmax(axis=0)
    weight = np.zeros_like(cross)
    targets = np.arange(num_targets)
    weight[chosen, targets] = slope[chosen, targets]
    return weight


def mean_share(shares: Float[np.ndarray, "targets"]) -> float:
    """Return the mean over the targets that vary; NaN when none does."""
    known = shares[np.isfinite(shares)]
    return float(known.mean()) if len(known) else float("nan")


def _leave_one_out(rows: Rows, blocks: FloatArray) -> Iterator[tuple[Moments, Moments]]:
    """Yield the moments of all folds but one, and of that one."""
    moments = [_feature_moments(fold, rows, blocks) for fold in rows.fold_moments]
    for index, held_out in enumerate(moments):
        yield reduce(Moments.merge, [m for i, m in enumerate(moments) if i != index]), held_out


def _feature_moments(moments: Moments, rows: Rows, blocks: FloatArray) -> Moments:
    """Return the moments of [features, targets] from those of the columns. The ranges only bound the true ones."""
    size = rows.state_dim
    transform = np.zeros((len(blocks) * size + rows.num_targets, len(moments.mean)))
    transform[: len(blocks) * size, : -rows.num_targets] = np.kron(blocks, np.eye(size))
    transform[len(blocks) * size :, -rows.num_targets :] = np.eye(rows.num_targets)
    largest = np.abs(transform) @ np.maximum(abs(moments.minimum), abs(moments.maximum))
    comoment = transform @ moments.comoment @ transform.T
    return Moments(moments.count, transform @ moments.mean, comoment, -largest, largest)


def _squared_error(held_out: Moments, weight: FloatArray, mean: FloatArray) -> Float[np.ndarray, "targets"]:
    """Return the sum of squared errors of a linear inverse over the rows behind `held_out`."""
    error = np.concatenate([-weight, np.eye(weight.shape[1])])
    bias = (held_out.mean - mean) @ error
    squares = np.einsum("ij,ij->j", error, held_out.comoment @ error)
    total: FloatArray = np.maximum(squares, 0.0) + held_out.count * bias**2
    return total


def _variance(rows: Rows) -> Float[np.ndarray, "targets"]:
    """Return the variance of each target; 0 where it is constant but for rounding."""
    whole = reduce(Moments.merge, rows.fold_moments)
    variance: FloatArray = np.where(whole.varies, whole.std**2, 0.0)[-rows.num_targets :]
    return variance


def per_action(shares: Float[np.ndarray, "targets"], action_dim: int) -> Sequence[float]:
    """Return the mean share of each action dimension over the horizon."""
    return [mean_share(column) for column in shares.reshape(-1, action_dim).T]
