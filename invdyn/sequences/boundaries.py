"""Where episodes start and end, from flags and columns. Pure index math: no loop over steps."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, Num

Rows = Int[np.ndarray, "runs"]


def runs_between(ends: Bool[np.ndarray, "rows"]) -> tuple[Rows, Rows]:
    """Return (first row, number of rows) of the runs that flags at their last row delimit.

    Rows after the last flag make a last run: the recording stopped there.

    Example:
        >>> [column.tolist() for column in runs_between(np.array([False, True, False]))]
        [[0, 2], [2, 1]]
    """
    stops = np.flatnonzero(ends) + 1
    if len(ends) and (not len(stops) or stops[-1] != len(ends)):
        stops = np.append(stops, len(ends))
    first = np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(stops)]
    return first, (stops - first).astype(np.int64)


def runs_where(keep: Bool[np.ndarray, "rows"], ends: Bool[np.ndarray, "rows"]) -> tuple[Rows, Rows]:
    """Return (first row, number of rows) of the runs of kept rows, also cut after each flagged row.

    Example:
        >>> keep, ends = np.array([1, 1, 0, 1, 1], bool), np.array([1, 0, 0, 0, 1], bool)
        >>> [column.tolist() for column in runs_where(keep, ends)]
        [[0, 1, 3], [1, 1, 2]]
    """
    starts = keep & np.concatenate([[True], ends[:-1] | ~keep[:-1]])[: len(keep)]
    first = np.flatnonzero(starts)
    counts = np.add.reduceat(keep, first, dtype=np.int64) if len(first) else np.zeros(0, dtype=np.int64)
    return first.astype(np.int64), counts


def lengths_from_ends(ends: Num[np.ndarray, "episodes"]) -> tuple[Rows, Rows]:
    """Return (first row, number of rows) of episodes from their cumulative exclusive ends."""
    ends = ends.astype(np.int64)
    first = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    return first, ends - first


def continues(
    next_states: Num[np.ndarray, "rows state_dim"], states: Num[np.ndarray, "rows state_dim"]
) -> Bool[np.ndarray, "rows_but_one"]:
    """Return whether the next state of each row is the state of the row after it, to the bit."""
    return np.asarray((next_states[:-1] == states[1:]).all(axis=1))


def weave_last(
    states: Num[np.ndarray, "rows state_dim"],
    next_states: Num[np.ndarray, "rows state_dim"],
    num_rows: Rows,
) -> Num[np.ndarray, "states state_dim"]:
    """Append to each run of rows the next state of its last row.

    Args:
        states: states of the runs, end to end.
        next_states: their next states.
        num_rows: rows of each run.

    Returns:
        (rows + runs, state_dim), one state more per run.

    Example:
        >>> weave_last(np.array([[1], [2], [5]]), np.array([[2], [3], [6]]), np.array([2, 1]))[:, 0].tolist()
        [1, 2, 3, 5, 6]
    """
    ends = np.cumsum(num_rows)
    woven = np.empty((len(states) + len(num_rows), *states.shape[1:]), dtype=np.result_type(states, next_states))
    woven[np.arange(len(states)) + np.repeat(np.arange(len(num_rows)), num_rows)] = states
    woven[ends + np.arange(len(num_rows))] = next_states[ends - 1]
    return woven


def shifted(rows: slice, offset: int) -> slice:
    """Return a range of rows moved by `offset`."""
    return slice(rows.start + offset, rows.stop + offset)
