"""What the nearest rows say about an action that the linear inverse does not."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from invdyn.doctor.dynamics import HeldOut, Rows, block_features, least_share
from invdyn.transitions.store import spread_rows

NUM_NEIGHBOURS = 5
QUERIES = 500
REFERENCES = 3000


def nearest(
    query: Float[np.ndarray, "queries dim"], reference: Float[np.ndarray, "references dim"], count: int
) -> Int[np.ndarray, "queries count"]:
    """Return the `count` nearest reference rows of each query row, in no order.

    Example:
        >>> nearest(np.array([[0.1], [8.0]]), np.array([[9.0], [0.0], [5.0]]), count=1).tolist()
        [[1], [0]]
    """
    distance = (reference**2).sum(axis=1) - 2.0 * query @ reference.T  # but for the query's own square: the same order
    found: Int[np.ndarray, "queries count"] = np.argpartition(distance, count - 1, axis=1)[:, :count]
    return found


def unexplained_by_neighbours(
    rows: Rows, blocks: Float[np.ndarray, "blocks known"], folds: list[HeldOut]
) -> Float[np.ndarray, "targets"]:
    """Return the share of each target's variance left by the linear inverse plus the mean residual of nearest rows.

    Neighbours come from other episodes only: rows of one episode a few steps apart have like actions whatever the
    states say. Distances are between standardised features. An upper bound of what the window leaves open: more rows
    and a better model may find more.

    Returns:
        (targets,) mean squared error / variance; NaN for a constant target.
    """
    errors = np.concatenate([_fold_errors(rows, blocks, held, index) for index, held in enumerate(folds)], axis=1)
    return least_share(rows, (errors**2).sum(axis=1), errors.shape[1])


def _fold_errors(
    rows: Rows, blocks: Float[np.ndarray, "blocks known"], held: HeldOut, fold: int
) -> Float[np.ndarray, "ridges queries targets"]:
    others = held.fitted
    query, reference = np.flatnonzero(rows.fold == fold), np.flatnonzero(rows.fold != fold)
    query = query[spread_rows(len(query), QUERIES // rows.num_folds)]
    reference = reference[spread_rows(len(reference), REFERENCES)]
    mean, std = (column[: -rows.num_targets] for column in (others.mean, others.std))
    scale = np.divide(1.0, std, where=std > 0, out=np.zeros_like(std))
    inside, outside = (block_features(rows, blocks, chosen) - mean for chosen in (query, reference))
    chosen = nearest(inside * scale, outside * scale, min(NUM_NEIGHBOURS, len(reference)))
    errors = np.empty((len(held.weights), len(query), rows.num_targets))
    for index, weight in enumerate(held.weights):
        residual = rows.target[reference] - others.mean[-rows.num_targets :] - outside @ weight
        predicted = others.mean[-rows.num_targets :] + inside @ weight + residual[chosen].mean(axis=1)
        errors[index] = rows.target[query] - predicted
    return errors
