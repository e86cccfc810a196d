"""Look at a recording before it is planned: what the filters measure, and how many rows of each episode they leave.

Scans go through the same segments as the extraction, on any number of workers, and are put together in plan order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from invdyn.transitions.plan import Segment, kept_pieces
from invdyn.transitions.windows import Window, ranges

SCALE_STATES = 200_000
"""States that the typical step is measured on: all of a small recording, evenly spaced episodes of a large one."""

PerEpisode = Int[np.ndarray, "episodes"]
Record = dict[str, Any]
Task = Callable[[Segment], Record]
RunTasks = Callable[[Task, Sequence[Segment]], Iterable[Record]]
"""Runs a task for every segment and yields the records in any order; raises when one failed."""


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

    @property
    def is_trivial(self) -> bool:
        """Whether nothing had to be looked at."""
        return not (self.row_filter.drops_rows or self.constant_dims)

    def filter_json(self) -> Record:
        """Return what the tasks do to their rows as JSON values; numbers come back from them to the bit."""
        row_filter = self.row_filter
        jumps = row_filter.jumps
        return {
            "drop_stale": row_filter.drop_stale,
            "jumps": jumps and {"scale": jumps.scale.tolist(), "typical": jumps.typical, "multiple": jumps.multiple},
            "drop_at": _bounds_json(row_filter.drop_at),
            "clip_to": _bounds_json(row_filter.clip_to),
            "state_dims": None if row_filter.state_dims is None else row_filter.state_dims.tolist(),
            "action_dims": None if row_filter.action_dims is None else row_filter.action_dims.tolist(),
        }

    def to_json(self) -> Record:
        """Return all of it as JSON values."""
        return {
            "row_filter": self.filter_json(),
            "row_drops": {reason: counts.tolist() for reason, counts in self.row_drops.items()},
            "constant_dims": self.constant_dims and self.constant_dims.model_dump(mode="json"),
        }

    @classmethod
    def from_json(cls, values: Record) -> Scan:
        """Undo `to_json`."""
        made = dict(values["row_filter"])
        if made["jumps"]:
            made["jumps"] = JumpScale(**{**made["jumps"], "scale": np.array(made["jumps"]["scale"])})
        for name in ("drop_at", "clip_to"):
            made[name] = made[name] and Bounds(*(np.array(side, np.float32) for side in made[name]))
        for name in ("state_dims", "action_dims"):
            made[name] = None if made[name] is None else np.array(made[name], np.int64)
        constant = values["constant_dims"]
        return cls(
            row_filter=RowFilter(**made),
            row_drops={reason: np.array(counts, np.int64) for reason, counts in values["row_drops"].items()},
            constant_dims=None if constant is None else ConstantDims.model_validate(constant),
        )


def scan_recording(
    filters: FiltersConfig,
    reader: SequenceReader,
    window: Window,
    sequences: SequencePlan,
    keep: Bool[np.ndarray, "episodes"],
    segments: Sequence[Segment],
    run: RunTasks,
) -> Scan:
    """Measure what the filters need, then count the rows that they leave out.

    Args:
        filters: which are on.
        reader: reads the recording.
        window: what a row holds.
        sequences: the recording.
        keep: (episodes,) which episodes give rows before that; the others are not read.
        segments: the whole recording in pieces.
        run: runs a task for each of some segments.

    Raises:
        DataError: when values are not finite, bounds do not fit, or no dimension varies.
    """
    row_filter, constant = RowFilter(drop_stale=filters.drop_stale), None
    if filters.finds_bounds or filters.drop_constant_dims:
        found = _merge_ranges(_in_order(run(partial(scan_ranges, reader), segments)))
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
        (measured,) = run(partial(measure_steps, reader), [step_sample(sequences, keep)])
        scale = np.array(measured["scale"])
        row_filter = replace(row_filter, jumps=JumpScale(scale, measured["typical"], filters.drop_jumps))
    drops: dict[str, PerEpisode] = {}
    if row_filter.drops_rows:
        for record in _in_order(run(partial(scan_rows, reader, window, row_filter), segments)):
            for reason, counts in record["rows"].items():
                total = drops.setdefault(reason, np.zeros(sequences.num_episodes, np.int64))
                first = record["first_episode"]
                total[first : first + len(counts)] = counts
    return Scan(row_filter, drops, constant)


def count_scans(filters: FiltersConfig, num_segments: int) -> int:
    """Return how many tasks `scan_recording` runs."""
    passes = int(filters.finds_bounds or filters.drop_constant_dims) + int(filters.drops_rows)
    return passes * num_segments + int(filters.drop_jumps is not None)


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


def step_sample(sequences: SequencePlan, keep: Bool[np.ndarray, "episodes"]) -> Segment:
    """Return the episodes that the typical step is measured on, as one segment."""
    kept = np.flatnonzero(keep)
    chosen = np.zeros(sequences.num_episodes, dtype=bool)
    chosen[kept[evenly_spaced(sequences.num_states[kept], SCALE_STATES)]] = True
    number = np.zeros(sequences.num_episodes, np.int64)
    return Segment(0, 0, sequences, split=number, row_limit=number, keep=chosen, hash_files=())


def measure_steps(reader: SequenceReader, segment: Segment) -> Record:
    """Measure the typical step: the median size of the steps that move, in standard deviations of each dimension.

    Raises:
        DataError: when values are not finite.
    """
    state = read_episodes(reader, segment.sequences, segment.keep).state.astype(np.float64)
    lengths = segment.sequences.num_states[segment.keep]
    state_row = ranges(np.cumsum(lengths) - lengths, lengths - 1)
    scale = state_scale(state)
    typical = typical_step(step_sizes(relative_steps(state, state_row, scale)))
    return {"index": segment.index, "scale": scale.tolist(), "typical": typical}


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
    for plan in kept_pieces(sequences, keep):
        arrays = reader.read(plan)
        states = slice(first_state, first_state + len(arrays.state))
        actions = slice(first_action, first_action + len(arrays.action))
        first_state, first_action = states.stop, actions.stop
        with np.errstate(over="ignore"):
            state[states], action[actions] = arrays.state, arrays.action
        if not all_finite(EpisodeArrays(state[states], action[actions])):
            check_finite(arrays, plan)  # the values as recorded say what is wrong
    return EpisodeArrays(state, action)


def _bounds_json(bounds: Bounds | None) -> list[list[float]] | None:
    return None if bounds is None else [bounds.low.tolist(), bounds.high.tolist()]


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
