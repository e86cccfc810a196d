"""Read a segment block by block: memory is bounded by the block, and what is read stays in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from invdyn.sequences.base import EpisodeArrays, ReadRows, SequencePlan, SequenceReader, all_finite, check_finite
from invdyn.sequences.boundaries import runs_where
from invdyn.transitions.plan import PerEpisode, Segment
from invdyn.transitions.windows import Window

BLOCK_BYTES = 4 * 2**20
"""Recorded bytes in a block, counted as float64."""

NO_ARRAYS = EpisodeArrays(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))


@dataclass(frozen=True)
class Block:
    """A stretch of a segment. Its first and last episode may be cut; what it holds of them is enough for its rows.

    Attributes:
        arrays: states and actions of its episodes, end to end, float32 and finite.
        first_episode: its first episode, by number within the segment.
        num_states: (episodes,) states that it holds of each.
        num_actions: (episodes,) actions.
        num_rows: (episodes,) rows that start in it.
        first_step: (episodes,) step of the first state that it holds of each.
    """

    arrays: EpisodeArrays
    first_episode: int
    num_states: PerEpisode
    num_actions: PerEpisode
    num_rows: PerEpisode
    first_step: PerEpisode

    @property
    def episodes(self) -> slice:
        """Its episodes, as a slice of the segment's columns."""
        return slice(self.first_episode, self.first_episode + len(self.num_rows))


def iter_blocks(reader: SequenceReader, window: Window, segment: Segment, num_rows: PerEpisode) -> Iterator[Block]:
    """Read the first `num_rows` rows of each episode of a segment.

    All values of an episode are read and checked when all of its rows are wanted, else those that the rows span.

    Args:
        reader: reads the recording.
        window: what a row holds.
        segment: the episodes.
        num_rows: (episodes,) rows wanted of each, at most what the window gives.

    Raises:
        DataError: naming file, episode and step of values that are not finite.
    """
    sequences = segment.sequences
    limited = num_rows < window.num_rows(sequences.num_states, sequences.num_actions)
    first_of_run, run_length = runs_where(num_rows > 0, limited)
    for first, length in zip(first_of_run.tolist(), run_length.tolist(), strict=True):
        start = first
        for plan in sequences.slice(first, first + length).by_file():
            mine = slice(start, start + plan.num_episodes)
            with reader.open(plan) as read:
                for block in _cut(plan, window, num_rows[mine], bool(limited[mine.stop - 1])):
                    yield replace(block, arrays=_read(read, plan, block), first_episode=start + block.first_episode)
            start = mine.stop


def _cut(plan: SequencePlan, window: Window, num_rows: PerEpisode, limited: bool) -> Iterator[Block]:
    """Cut the rows of a file's episodes into blocks without arrays; `limited`: not all of the last one are wanted."""
    ends = np.cumsum(num_rows)
    block_rows = max(1, BLOCK_BYTES // (8 * (plan.state_dim + plan.action_dim)))
    for start in range(0, int(ends[-1]), block_rows):
        stop = min(start + block_rows, int(ends[-1]))
        first, last = (int(i) for i in np.searchsorted(ends, [start, stop - 1], side="right"))
        mine = slice(first, last + 1)
        skipped = np.zeros(last + 1 - first, dtype=np.int64)
        skipped[0] = start - (ends[first] - num_rows[first])
        rows = num_rows[mine] - skipped
        rows[-1] -= ends[last] - stop
        num_states, num_actions = plan.num_states[mine] - skipped, plan.num_actions[mine] - skipped
        if stop < ends[last] or (limited and last == len(ends) - 1):
            # A filter looks at every step that a row spans, up to its last action or its next state.
            num_states[-1] = min(num_states[-1], rows[-1] + window.history + max(window.gap, window.horizon))
            num_actions[-1] = min(num_actions[-1], rows[-1] + window.history + window.horizon - 1)
        yield Block(NO_ARRAYS, first, num_states, num_actions, rows, skipped)


def _read(read: ReadRows, plan: SequencePlan, block: Block) -> EpisodeArrays:
    states = _range(plan.num_states, block, block.num_states)
    actions = _range(plan.num_actions, block, block.num_actions)
    found = read(states, actions)
    with np.errstate(over="ignore"):
        stored = EpisodeArrays(*(values.astype(np.float32, copy=False) for values in (found.state, found.action)))
    if not all_finite(stored):
        held = plan.slice(block.episodes.start, block.episodes.stop)
        held = replace(held, num_states=block.num_states, num_actions=block.num_actions)
        check_finite(found, held, int(block.first_step[0]))  # the values as recorded say what is wrong
    return stored


def _range(lengths: Int[np.ndarray, "episodes"], block: Block, held: PerEpisode) -> slice:
    """Return which of a file's rows a block holds, counted from the plan's first."""
    start = int(lengths[: block.first_episode].sum() + block.first_step[0])
    return slice(start, start + int(held.sum()))
