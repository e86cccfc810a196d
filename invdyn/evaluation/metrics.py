"""How far predicted actions are from recorded ones. Pure numpy in float64; actions are flat, (rows, dims)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num

from invdyn.errors import DataError
from invdyn.statistics import CONSTANT_TOLERANCE, Moments

PerDim = Float[np.ndarray, "dims"]
Rows = Num[np.ndarray, "rows dims"]
PerRow = Float[np.ndarray, "rows"]
Samples = Num[np.ndarray, "samples rows dims"]


def flat_actions(action: Num[np.ndarray, "rows ..."]) -> Float[np.ndarray, "rows dims"]:
    """Return actions as (rows, horizon * action_dim) float64."""
    return action.reshape(len(action), -1).astype(np.float64)


def varying_std(moments: Moments, columns: slice) -> PerDim:
    """Return the training standard deviation of some columns, (dims,); NaN where the column is constant.

    Raises:
        DataError: when every column is constant: no error can be put in proportion.
    """
    scale = np.where(moments.varies, moments.std, np.nan)[columns]
    if np.isnan(scale).all():
        raise DataError("the training rows must vary, got constant values in every column; record other actions")
    return scale


def nrmse_per_dim(prediction: Rows, truth: Rows, std: PerDim) -> PerDim:
    """Return RMSE / std of each dimension, (dims,); NaN where `std` is NaN (a constant dimension).

    Args:
        prediction: (rows, dims).
        truth: (rows, dims), same units.
        std: (dims,), of the training rows, from `varying_std`.
    """
    error = prediction.astype(np.float64) - truth
    relative: PerDim = np.sqrt(np.square(error).mean(axis=0)) / std
    return relative


def nrmse(prediction: Rows, truth: Rows, std: PerDim) -> float:
    """Return the RMSE of all standardised values of the dimensions that vary; NaN when none does.

    Args:
        prediction: (rows, dims).
        truth: (rows, dims), same units.
        std: (dims,), of the training rows; NaN or 0 for a constant dimension.
    """
    varies = std > 0
    if not varies.any():
        return float("nan")
    per_dim = nrmse_per_dim(prediction[:, varies], truth[:, varies], std[varies])
    return float(np.sqrt(np.square(per_dim).mean()))


def r2_per_dim(prediction: Rows, truth: Rows) -> PerDim:
    """Return the share of the variance of `truth` that is explained, (dims,); NaN where `truth` does not vary.

    1 is perfect, 0 is what the mean of `truth` scores, below 0 is worse than that.
    """
    truth = truth.astype(np.float64)
    residual = np.square(prediction - truth).sum(axis=0)
    total = np.square(truth - truth.mean(axis=0)).sum(axis=0)
    varies = total > len(truth) * np.square(CONSTANT_TOLERANCE * np.abs(truth).max(axis=0))
    return np.where(varies, 1.0 - residual / np.where(varies, total, 1.0), np.nan)


def rmse_per_dim(prediction: Rows, truth: Rows) -> PerDim:
    """Return the root mean squared error of each dimension, (dims,), in the units of the actions."""
    error: PerDim = np.sqrt(np.square(prediction.astype(np.float64) - truth).mean(axis=0))
    return error


def energy_score(samples: Samples, truth: Rows, std: PerDim) -> float:
    """Return the mean of `energy_scores` over rows."""
    return float(energy_scores(samples, truth, std).mean())


def energy_scores(samples: Samples, truth: Rows, std: PerDim) -> PerRow:
    """Return E|X - a| - E|X - X'| / 2 of each row, (rows,), in units of `std`; lower is better.

    A proper score of a whole distribution: it is lowest in expectation when X has the distribution of a. The estimate
    is unbiased over the samples (pairs of different samples only). A point prediction scores its absolute error.

    Source: Gneiting & Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation" (2007), eq. 22.

    Args:
        samples: (samples, rows, dims), two samples or more; a point prediction repeats itself.
        truth: (rows, dims).
        std: (dims,), from `varying_std`; constant dimensions are left out.
    """
    return expected_energy_scores(samples, truth[None], std)


def expected_energy_scores(samples: Samples, draws: Samples, std: PerDim, exponent: float = 1.0) -> PerRow:
    """Return the mean over draws Y of E|X - Y|^exponent - E|X - X'|^exponent / 2, of each row, (rows,).

    Args:
        samples: (samples, rows, dims), two or more.
        draws: (draws, rows, dims) of what is to be predicted.
        std: (dims,), the unit, from `varying_std`; constant dimensions are left out.
        exponent: above 0 and below 2, which keeps the score proper; the smaller, the more near distances count.
    """
    scaled, others = _in_units(samples, std), _in_units(draws, std)
    own = [(sample, other) for index, sample in enumerate(scaled) for other in scaled[:index]]
    across = [(sample, other) for other in others for sample in scaled]
    return _mean_distances(across, exponent) - _mean_distances(own, exponent) / 2


def _mean_distances(pairs: Sequence[tuple[Rows, Rows]], exponent: float) -> PerRow:
    total: PerRow = sum(np.linalg.norm(one - other, axis=1) ** exponent for one, other in pairs)
    return total / len(pairs)


def _in_units(values: Samples, std: PerDim) -> Samples:
    varies = std > 0
    scaled: Samples = values[..., varies] / std[varies]
    return scaled


def crps(samples: Samples, truth: Rows) -> Float[np.ndarray, "rows dims"]:
    """Return the continuous ranked probability score of each value, (rows, dims), in the units of the actions.

    The energy score of one dimension alone: E|X - a| - E|X - X'| / 2, unbiased over the samples ("fair": the score of
    a few samples is that of their distribution). Pairs are summed over sorted samples: sample i of S stands above i
    others and below S - 1 - i.

    Source: Ferro, "Fair scores for ensemble forecasts" (2014), eq. 6, for whole distributions.

    Args:
        samples: (samples, rows, dims), two samples or more.
        truth: (rows, dims).
    """
    count = len(samples)
    to_truth = np.abs(samples - truth).mean(axis=0)
    weights = (2.0 * np.arange(count) - count + 1) / (count * (count - 1) / 2)
    by_value = np.ascontiguousarray(np.moveaxis(samples, 0, -1))  # sorts twice as fast as the samples of many values
    between = np.sort(by_value, axis=-1) @ weights
    scores: Float[np.ndarray, "rows dims"] = to_truth - between / 2
    return scores
