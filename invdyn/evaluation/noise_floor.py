"""How much of the action the transition leaves open, estimated from neighbouring transitions without any model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Rows = Float[np.ndarray, "rows columns"]
PerDim = Float[np.ndarray, " dims"]

NEIGHBOURS = 10
QUERIES = 1_000
REFERENCES = 20_000
CHUNK_QUERIES = 100


@dataclass(frozen=True)
class NoiseFloor:
    """The noise of the action given the transition, as far as neighbours tell.

    Attributes:
        nrmse: root of the mean noise variance, in std of the action, or more: the least RMSE / std of a mean prediction
            is at most this; one sample of the exact posterior scores the root of two times as much.
        std_per_dim: (dims,) noise standard deviation of each action dimension, in its units.
        num_queries: transitions whose neighbours were looked at.
        num_references: transitions among which they were found.
    """

    nrmse: float
    std_per_dim: tuple[float, ...]
    num_queries: int
    num_references: int


def estimate_noise_floor(
    query: Rows, query_target: Rows, reference: Rows, reference_target: Rows, target_std: PerDim
) -> NoiseFloor:
    """Estimate the variance of the target that the features leave open.

    Half the mean squared difference of the targets of two neighbours is the noise variance, plus what the target
    changes over their distance. The Gamma test fits that change: over the first `NEIGHBOURS` neighbours, the half
    squared difference is regressed on the squared distance, and its value at distance 0 is the estimate, kept between
    0 and the value of the nearest. Where rows are few for the number of features it is an upper bound, no more.

    Source: Stefansson, Koncar & Jones, "A Note on the Gamma Test" (1997).

    Args:
        query: (queries, features) standardised.
        query_target: (queries, dims), best the residual of a linear fit: its slopes are smaller.
        reference: (references, features) of other episodes, the same units.
        reference_target: (references, dims).
        target_std: (dims,) unit of each dimension in `nrmse`; those of NaN are left out.
    """
    count = min(NEIGHBOURS, len(reference))
    squared, halved = (np.empty((0, count)), np.empty((0, count, query_target.shape[1])))
    for first in range(0, len(query), CHUNK_QUERIES):
        chunk = slice(first, first + CHUNK_QUERIES)
        nearest, distance = _nearest(query[chunk], reference, count)
        difference = query_target[chunk, None] - reference_target[nearest]
        squared = np.concatenate([squared, distance])
        halved = np.concatenate([halved, np.square(difference) / 2.0])
    gamma, delta = halved.mean(axis=0), squared.mean(axis=0)  # (neighbours, dims), (neighbours,)
    centred = delta - delta.mean()
    slope = centred @ gamma / max(float(centred @ centred), np.finfo(float).tiny)
    variance = np.clip(gamma.mean(axis=0) - slope * delta.mean(), 0.0, gamma[0])
    return NoiseFloor(
        nrmse=float(np.sqrt(np.nanmean(variance / np.square(target_std)))),
        std_per_dim=tuple(np.sqrt(variance).tolist()),
        num_queries=len(query),
        num_references=len(reference),
    )


def _nearest(query: Rows, reference: Rows, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` nearest references of each query by rising distance, and their squared distances."""
    distance = np.square(reference).sum(axis=1) - 2.0 * query @ reference.T + np.square(query).sum(axis=1)[:, None]
    found = np.argpartition(distance, count - 1, axis=1)[:, :count]
    near = np.take_along_axis(distance, found, axis=1)
    order = np.argsort(near, axis=1)
    return np.take_along_axis(found, order, axis=1), np.maximum(np.take_along_axis(near, order, axis=1), 0.0)
