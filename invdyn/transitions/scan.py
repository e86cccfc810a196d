"""Look at a recording before it is planned: what the filters measure, and how many rows of each episode they leave.

Scans go through the same segments as the extraction, on any number of workers, and are put together in plan order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Num

from invdyn.sequences.base import EpisodeArrays, SequencePlan, SequenceReader, all_finite, check_finite
from invdyn.transitions.filters import (
    FEW_VALUES,
    Bounds,
    ConstantDims,
    FiltersConfig,
    JumpScale,
    RowFilter,
    count_per_episode,
    drop_masks,
    given_bounds,
    relative_steps,
    state_scale,
    step_sizes,
    typical_step,
)
from invdyn.transitions.plan import Segment
from invdyn.transitions.windows import Window, ranges

SCALE_STATES = 200_000
"""States that the typical step is measured on: all of a small recording, evenly spaced episodes of a large one."""

PerEpisode = Int[np.ndarray, "episodes"]
Record = dict[str, Any]
Task = Callable[[Segment], Record]
RunTasks = Callable[[Task], Iterator[Record]]
"""Runs a task for every segment and yields the records in any order; raises on the first that failed."""


@dataclass(frozen=True)
class Scan:
    """What a recording's filters come to.

    Attributes:
        row_filter: what the tasks do to their rows.
        row_drops: (episodes,) rows left out of each episode, by reason.
        constant_dims: None when they stay in the rows.
    """

    row_filter: RowFilter
    row_drops: dict[str, PerEpisode]
    constant_dims: ConstantDims | None


def scan_recording(
    filters: FiltersConfig,
    reader: SequenceReader,
    window: Window,
    sequences: SequencePlan,
    keep: Bool[np.ndarray, "episodes"],
    run: RunTasks,
) -> Scan:
    """Measure what the filters need, then count the rows that they leave out.

    Args:
        filters: which are on.
        reader: reads the recording.
        window: what a row holds.
        sequences: the recording.
        keep: (episodes,) which episodes may give rows.
        run: runs a task for every segment of the recording.

    Raises:
        DataError: when values are not finite, bounds do not fit, or no dimension varies.
    """
    row_filter, constant = RowFilter(drop_stale=filters.drop_stale), None
    if filters.finds_bounds or filters.drop_constant_dims:
        found = _merge_ranges(_in_order(run(partial(scan_ranges, reader))))
        if filters.drop_constant_dims:
            constant = _constant_dims(found)
            row_filter = row_filter.without_dims(constant, sequences.state_dim, sequences.action_dim)
        if filters.finds_bounds:
            row_filter = replace(row_filter, drop_at=_found_bounds(found["action"]))
    if filters.action_bounds is not None:
        bounds = given_bounds(filters.action_bounds, sequences.action_dim)
        clips = filters.saturated_actions == "clip"
        row_filter = replace(row_filter, clip_to=bounds) if clips else replace(row_filter, drop_at=bounds)
    if filters.drop_jumps is not None:
        row_filter = replace(row_filter, jumps=measure_steps(reader, sequences, keep, filters.drop_jumps))
    drops: dict[str, PerEpisode] = {}
    if row_filter.drops_rows:
        for record in _in_order(run(partial(scan_rows, reader, window, row_filter))):
            for reason, counts in record["rows"].items():
                total = drops.setdefault(reason, np.zeros(sequences.num_episodes, np.int64))
                first = record["first_episode"]
                total[first : first + len(counts)] = counts
    return Scan(row_filter, drops, constant)


def scan_ranges(reader: SequenceReader, segment: Segment) -> Record:
    """Return the extremes and, up to `FEW_VALUES` of them, the distinct values of each column of a segment."""
    arrays = read_episodes(reader, segment.sequences, segment.keep)
    record: Record = {"index": segment.index}
    for name, values in (("state", arrays.state), ("action", arrays.action)):
        record[name] = {"low": values.min(axis=0).tolist(), "high": values.max(axis=0).tolist()}
    record["action"]["few"] = [np.unique(column)[:FEW_VALUES].tolist() for column in arrays.action.T]
    return record


def scan_rows(reader: SequenceReader, window: Window, row_filter: RowFilter, segment: Segment) -> Record:
    """Return how many rows of each episode of a segment are left out, by reason."""
    arrays = read_episodes(reader, segment.sequences, segment.keep)
    num_states, num_actions = kept_lengths(segment)
    masks = drop_masks(row_filter, arrays, window, num_states, num_actions)
    rows = window.num_rows(num_states, num_actions)
    counts = {reason: count_per_episode(mask, rows).tolist() for reason, mask in masks.items()}
    return {"index": segment.index, "first_episode": segment.first_episode, "rows": counts}


def kept_lengths(segment: Segment) -> tuple[PerEpisode, PerEpisode]:
    """Return states and actions of each episode of a segment; none of those that are left out."""
    sequences = segment.sequences
    return np.where(segment.keep, sequences.num_states, 0), np.where(segment.keep, sequences.num_actions, 0)


def measure_steps(
    reader: SequenceReader, sequences: SequencePlan, keep: Bool[np.ndarray, "episodes"], multiple: float
) -> JumpScale:
    """Measure the typical step: the median size of the steps that move, in standard deviations of each dimension.

    Raises:
        DataError: when values are not finite.
    """
    kept = np.flatnonzero(keep)
    chosen = kept[evenly_spaced(sequences.num_states[kept], SCALE_STATES)]
    wanted = np.zeros(sequences.num_episodes, dtype=bool)
    wanted[chosen] = True
    state = read_episodes(reader, sequences, wanted).state.astype(np.float64)
    lengths = sequences.num_states[chosen]
    state_row = ranges(np.cumsum(lengths) - lengths, lengths - 1)
    scale = state_scale(state)
    return JumpScale(scale, typical_step(step_sizes(relative_steps(state, state_row, scale))), multiple)


def evenly_spaced(num_states: PerEpisode, max_states: int) -> Int[np.ndarray, "chosen"]:
    """Choose episodes of about `max_states` states in all: all, or evenly spaced ones; at least two.

    Example:
        >>> evenly_spaced(np.full(6, 10), max_states=30).tolist()
        [0, 2, 5]
    """
    total = len(num_states)
    if num_states.sum() <= max_states:
        return np.arange(total)
    wanted = min(max(int(max_states / num_states.mean()), 2), total)
    chosen = np.unique(np.linspace(0, total - 1, wanted).round().astype(np.int64))
    # Long episodes among short ones: keep what fits, in order of their distance from a regular grid.
    fits = np.cumsum(num_states[chosen]) <= max_states
    fits[:2] = True
    return np.asarray(chosen[fits])


def read_episodes(reader: SequenceReader, sequences: SequencePlan, keep: Bool[np.ndarray, "episodes"]) -> EpisodeArrays:
    """Read the kept episodes of a plan, neighbours within a file together, as float32 and checked to be finite.

    Raises:
        DataError: naming file, episode and step of bad values.
    """
    kept = np.flatnonzero(keep)
    # Converted once, into one place, before the rows are cut: s and s' are then copies of half the size.
    state = np.empty((int(sequences.num_states[kept].sum()), sequences.state_dim), np.float32)
    action = np.empty((int(sequences.num_actions[kept].sum()), sequences.action_dim), np.float32)
    first_state = first_action = 0
    for run in np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1):
        for plan in sequences.slice(int(run[0]), int(run[-1]) + 1).by_file():
            arrays = reader.read(plan)
            states = slice(first_state, first_state + len(arrays.state))
            actions = slice(first_action, first_action + len(arrays.action))
            first_state, first_action = states.stop, actions.stop
            with np.errstate(over="ignore"):
                state[states], action[actions] = arrays.state, arrays.action
            if not all_finite(EpisodeArrays(state[states], action[actions])):
                check_finite(arrays, plan)  # the values as recorded say what is wrong
    return EpisodeArrays(state, action)


def _in_order(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: int(record["index"]))


def _merge_ranges(records: list[Record]) -> Record:
    merged: Record = {}
    for name in ("state", "action"):
        merged[name] = {
            "low": np.min([record[name]["low"] for record in records], axis=0),
            "high": np.max([record[name]["high"] for record in records], axis=0),
        }
    few = zip(*(record["action"]["few"] for record in records), strict=True)
    merged["action"]["num_values"] = np.array([len(set().union(*values)) for values in few])
    return merged


def _constant_dims(found: Record) -> ConstantDims:
    constant = {}
    for name in ("state", "action"):
        low, high = found[name]["low"], found[name]["high"]
        constant[name] = tuple((int(dim), float(low[dim])) for dim in np.flatnonzero(low == high))
    return ConstantDims(**constant)


def _found_bounds(found: dict[str, Num[np.ndarray, "action_dim"]]) -> Bounds:
    # A switch is at a bound in every row, and a constant is one: neither says that anything was saturated.
    continuous = found["num_values"] >= FEW_VALUES
    low = np.where(continuous, found["low"], -np.inf).astype(np.float32)
    high = np.where(continuous, found["high"], np.inf).astype(np.float32)
    return Bounds(low, high)
