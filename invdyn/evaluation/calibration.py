"""Do the regions of a predicted distribution hold the truth as often as they say?

Every test here ranks the recorded action among samples of its own transition. If both come from one distribution they
are exchangeable, so the rank is uniform: a central interval or a region of level q then holds the truth with
probability q exactly, for any number of samples, any dimension and any shape of the distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Num

Levels = Float[np.ndarray, "rows *dims"]
Samples = Num[np.ndarray, "samples rows dims"]
Rows = Num[np.ndarray, "rows dims"]

NOMINAL = tuple(np.arange(1, 20) / 20)
"""Levels of a calibration curve: 5% to 95%."""

RESOLUTION = 1e-5
"""Differences below this share of std count as ties: the rounding of float32 recordings, where one action is right."""

CHUNK_VALUES = 4_000_000


def central_levels(
    samples: Samples, truth: Rows, std: Float[np.ndarray, " dims"], generator: np.random.Generator
) -> Levels:
    """Return, for each value, the level of the smallest central interval that holds it, (rows, dims).

    The interval between the quantiles (1 - q) / 2 and (1 + q) / 2 of the samples; ties are broken at random. Uniform
    on [0, 1] when the samples are right, near 1 too often when they are too narrow or beside the truth.

    Args:
        samples: (samples, rows, dims).
        truth: (rows, dims).
        std: (dims,) unit of each dimension.
        generator: breaks ties, and spreads each rank over its share of [0, 1].
    """
    margin = RESOLUTION * np.nan_to_num(std)
    below = (samples < truth - margin).sum(axis=0)
    ties = (np.abs(samples - truth) <= margin).sum(axis=0)
    levels: Levels = np.abs(2.0 * _spread(below, ties, len(samples), generator) - 1.0)
    return levels


def density_levels(
    samples: Samples, truth: Rows, std: Float[np.ndarray, " dims"], generator: np.random.Generator
) -> Levels:
    """Return the level of the smallest highest-density region that holds each truth, (rows,).

    The density at a point is judged by its distance to the k-th nearest of the others, k about the root of the number
    of samples: the truth is ranked among the samples by that distance. So a region may have several parts, and every
    dimension counts. Uniform on [0, 1] when the samples are right.

    Args:
        samples: (samples, rows, dims), two or more.
        truth: (rows, dims).
        std: (dims,) unit of each dimension; those of NaN or 0 are left out.
        generator: breaks ties, and spreads each rank over its share of [0, 1].
    """
    varies = std > 0
    points = np.concatenate([truth[None], samples])[..., varies].astype(np.float64) / std[varies]
    points = np.ascontiguousarray(points.swapaxes(0, 1))  # (rows, 1 + samples, dims)
    nearest = round(np.sqrt(len(samples)))
    chunk = max(1, CHUNK_VALUES // points.shape[1] ** 2)
    distance = np.concatenate(
        [_distance_to_neighbour(points[first : first + chunk], nearest) for first in range(0, len(points), chunk)]
    )
    further = distance[:, :1] - distance[:, 1:]
    below, ties = (further > RESOLUTION).sum(axis=1), (np.abs(further) <= RESOLUTION).sum(axis=1)
    return _spread(below, ties, len(samples), generator)


def coverage(levels: Levels, nominal: Sequence[float] = NOMINAL) -> Float[np.ndarray, " nominal"]:
    """Return the share of values that regions of each nominal level hold.

    Args:
        levels: of `central_levels` or `density_levels`.
        nominal: levels in (0, 1).

    Example:
        >>> coverage(np.array([0.1, 0.2, 0.6, 0.95]), (0.5, 0.9)).tolist()
        [0.5, 0.75]
    """
    ordered = np.sort(levels, axis=None)
    return np.searchsorted(ordered, nominal, side="right") / len(ordered)


def calibration_error(covered: Float[np.ndarray, " nominal"], nominal: Sequence[float] = NOMINAL) -> float:
    """Return the mean distance of a calibration curve from the diagonal: 0 is right, .5 the worst."""
    return float(np.abs(covered - np.asarray(nominal)).mean())


def interval_widths(samples: Samples, level: float) -> Float[np.ndarray, " dims"]:
    """Return the mean width of the central interval of a level, per dimension, in the units of the samples.

    Sharpness: of two calibrated models the one with narrower intervals knows more.
    """
    low, high = np.quantile(samples, ((1.0 - level) / 2.0, (1.0 + level) / 2.0), axis=0)
    widths: Float[np.ndarray, " dims"] = (high - low).mean(axis=0)
    return widths


def _spread(
    below: Num[np.ndarray, "..."], ties: Num[np.ndarray, "..."], count: int, generator: np.random.Generator
) -> Float[np.ndarray, "..."]:
    """Return ranks among `count` samples on [0, 1]: each rank owns 1 / (count + 1), shared ranks all of theirs."""
    ranks: Float[np.ndarray, "..."] = (below + generator.random(below.shape) * (ties + 1)) / (count + 1)
    return ranks


def _distance_to_neighbour(
    points: Float[np.ndarray, "rows points dims"], nearest: int
) -> Float[np.ndarray, "rows points"]:
    """Return the distance of each point of a row to the `nearest`-th nearest other point of that row."""
    # Not by a product, which would round: differences of 1e-5 count.
    values = torch.from_numpy(points)
    distance = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    distance.partition(nearest, axis=2)
    found: Float[np.ndarray, "rows points"] = distance[..., nearest]  # the point itself is its nearest, at distance 0
    return found
