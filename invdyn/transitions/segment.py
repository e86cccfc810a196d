"""Extract one segment: what every worker does. Rows are read, checked, cut, measured and written block by block."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool

from invdyn.sequences.base import SequenceReader
from invdyn.sequences.files import open_binary
from invdyn.statistics import RunningMoments, one_blas_thread
from invdyn.storage import join
from invdyn.transitions.blocks import Block, iter_blocks
from invdyn.transitions.filters import RowFilter, count_clipped, drop_masks, first_of_each, stored_arrays
from invdyn.transitions.plan import SPLITS, TRAIN, PerEpisode, Segment
from invdyn.transitions.store import COLUMNS, Part, part_name, writing_part
from invdyn.transitions.windows import RowIndex, Transitions, Window, gather_rows, index_rows

HASH_CHUNK_BYTES = 512 * 1024

Record = dict[str, Any]


def extract_segment(
    reader: SequenceReader, window: Window, folder: str, row_filter: RowFilter, segment: Segment
) -> Record:
    """Extract one segment: write its parts, and return what the manifest needs of it.

    Raises:
        DataError: naming file, episode and step of bad values, or the part that could not be written.
    """
    record: Record = {"index": segment.index, "parts": {}}
    moments = RunningMoments()
    clipped = 0
    shapes = row_shapes(segment, window, row_filter)
    split_rows = {i: int(segment.row_limit[segment.split == i].sum()) for i in range(len(SPLITS))}
    names = {i: part_name(SPLITS[i], segment.index) for i, rows in split_rows.items() if rows}
    with ExitStack() as stack:
        stack.enter_context(one_blas_thread())
        files = {i: stack.enter_context(writing_part(join(folder, n), split_rows[i], shapes)) for i, n in names.items()}
        wanted = segment.row_limit.copy()
        for block in iter_blocks(reader, window, segment, candidate_rows(segment, window, row_filter)):
            kept = kept_rows(block, window, row_filter)
            stored = stored_arrays(row_filter, block.arrays)
            places = place_rows(block, window, segment.first_episode)
            for index, file in files.items():
                limit = np.where(segment.split[block.episodes] == index, wanted[block.episodes], 0)
                if not limit.any():
                    continue
                rows = gather_rows(stored, window, choose_rows(block, places, kept, limit))
                file.append({column: getattr(rows, column) for column in COLUMNS})
                if index == TRAIN:
                    moments.add(rows.state, rows.action, rows.next_state)
                if row_filter.clip_to is not None:
                    clipped += count_clipped_rows(row_filter, block, rows, segment.first_episode)
                if kept is not None:
                    np.subtract.at(wanted, rows.episode - segment.first_episode, 1)
    for index, file in files.items():
        record["parts"][SPLITS[index]] = asdict(Part(names[index], split_rows[index], file.content_hash()))
    found = moments.moments()
    record["moments"] = None if found is None else found.to_json()
    if row_filter.clip_to is not None:
        record["clipped_rows"] = clipped
    record["sources"] = [
        {"name": file.name, "size": file.size, "xxh3_128": hash_files(reader.source_paths(file))}
        for file in (segment.sequences.files[i] for i in segment.hash_files)
    ]
    return record


def row_shapes(segment: Segment, window: Window, row_filter: RowFilter) -> dict[str, tuple[int, ...]]:
    """Return the shape of one row of state, action and next_state."""
    sequences = segment.sequences
    state_dim = sequences.state_dim if row_filter.state_dims is None else len(row_filter.state_dims)
    action_dim = sequences.action_dim if row_filter.action_dims is None else len(row_filter.action_dims)
    return {
        "state": ((window.history + 1) * state_dim,),
        "action": (action_dim,) if window.horizon == 1 else (window.horizon, action_dim),
        "next_state": (state_dim,),
    }


def candidate_rows(segment: Segment, window: Window, row_filter: RowFilter) -> PerEpisode:
    """Return how many rows of each episode are looked at, (episodes,): those wanted, or all where some may drop out."""
    if not row_filter.drops_rows:
        return segment.row_limit
    available = window.num_rows(segment.sequences.num_states, segment.sequences.num_actions)
    return np.where(segment.row_limit > 0, available, 0)


def kept_rows(block: Block, window: Window, row_filter: RowFilter) -> Bool[np.ndarray, "rows"] | None:
    """Return which rows of a block no filter leaves out; None when there is no such filter."""
    if not row_filter.drops_rows:
        return None
    masks = drop_masks(row_filter, block.arrays, window, block.num_states, block.num_actions)
    return np.asarray(~np.logical_or.reduce(list(masks.values())))


def place_rows(block: Block, window: Window, first_episode: int) -> RowIndex:
    """Return where all rows of a block lie; `first_episode` is the number of the segment's first episode."""
    first = first_episode + block.first_episode
    return index_rows(window, block.num_states, block.num_actions, block.num_rows, first, block.first_step)


def choose_rows(block: Block, places: RowIndex, kept: Bool[np.ndarray, "rows"] | None, limit: PerEpisode) -> RowIndex:
    """Return the rows to take of some episodes of a block.

    Args:
        block: the episodes.
        places: of all its rows.
        kept: (rows,) which of them may be taken; all when None.
        limit: (episodes,) how many are still wanted of each; no limit where `kept` is None, but for 0.
    """
    chosen = np.repeat(limit > 0, block.num_rows)
    return places.take(chosen if kept is None else chosen & first_of_each(kept, block.num_rows, limit))


def count_clipped_rows(row_filter: RowFilter, block: Block, rows: Transitions, first_episode: int) -> int:
    """Return how many rows hold a recorded action beyond the bounds."""
    assert row_filter.clip_to is not None
    episode = rows.episode - first_episode - block.first_episode
    start = np.cumsum(block.num_actions) - block.num_actions - block.first_step
    horizon = rows.action.shape[1] if rows.action.ndim > 2 else 1
    return count_clipped(row_filter.clip_to, block.arrays.action, start[episode] + rows.step, horizon)


def hash_files(paths: Iterable[str]) -> str:
    """Return the XXH3-128 of the bytes of files, one after another."""
    digest = xxhash.xxh3_128()
    chunk = bytearray(HASH_CHUNK_BYTES)  # read again and again: fresh memory costs more than the hash
    view = memoryview(chunk)
    for path in paths:
        with open_binary(path) as file:
            while count := file.readinto(chunk):  # type: ignore[attr-defined]
                digest.update(view[:count])
    return digest.hexdigest()
