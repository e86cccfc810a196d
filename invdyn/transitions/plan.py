"""Plan an extraction: split by episode, limit the rows, cut into segments. Pure: the same recording, the same plan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from invdyn.errors import DataError
from invdyn.sequences.base import SequencePlan
from invdyn.transitions.windows import Window

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(len(SPLITS))
NO_SPLIT = -1
MAX_FILES = 256
"""Files that one task reads: opening a small file costs as much as reading 100 KB, so their bytes say too little."""

PerEpisode = Int[np.ndarray, "episodes"]
Episodes = Bool[np.ndarray, "episodes"]


@dataclass(frozen=True)
class Segment:
    """One task: consecutive episodes of the recording, and what is wanted of each.

    Attributes:
        index: number of the segment, and of the parts it writes.
        first_episode: number of its first episode in the whole recording.
        sequences: the plan of its episodes alone.
        split: (episodes,) index into `SPLITS`.
        row_limit: (episodes,) rows wanted of each episode.
        keep: (episodes,) which episodes may be read: a filter leaves the others out, or they are too short for a row.
        hash_files: which of its files, by index into `sequences.files`, this task hashes.
    """

    index: int
    first_episode: int
    sequences: SequencePlan
    split: PerEpisode
    row_limit: PerEpisode
    keep: Episodes
    hash_files: tuple[int, ...]


@dataclass(frozen=True)
class ExtractionPlan:
    """All segments in order, and what is dropped before any row is made.

    Attributes:
        sequences: the recording.
        window: what a row holds.
        segments: the tasks.
        split: (episodes,) index into `SPLITS`.
        row_limit: (episodes,) rows wanted of each episode.
        drops: actions that start no row, by reason.
    """

    sequences: SequencePlan
    window: Window
    segments: tuple[Segment, ...]
    split: PerEpisode
    row_limit: PerEpisode
    drops: dict[str, int]

    @property
    def num_rows(self) -> int:
        """Rows of all splits."""
        return int(self.row_limit.sum())

    def split_rows(self, split: int) -> int:
        """Rows of one split."""
        return int(self.row_limit[self.split == split].sum())


def make_plan(
    sequences: SequencePlan,
    window: Window,
    *,
    dataset_name: str,
    val_ratio: float,
    test_ratio: float,
    recorded_splits: bool = False,
    max_samples: int | None = None,
    segment_bytes: int = 64 * 2**20,
    episode_drops: Mapping[str, Episodes] | None = None,
    row_drops: Mapping[str, PerEpisode] | None = None,
) -> ExtractionPlan:
    """Plan the extraction of a recording.

    Args:
        sequences: the recording.
        window: what a row holds.
        dataset_name: goes into the hash that ranks the episodes.
        val_ratio: share of episodes for validation.
        test_ratio: share of episodes for the test.
        recorded_splits: take the split that the recording names for each episode; episodes without one are left out.
        max_samples: rows wanted in all; shared out in proportion to each split's rows, taken from its first episodes.
        segment_bytes: size of the recording's slice that one task extracts.
        episode_drops: (episodes,) which episodes a filter leaves out, by reason; none is under two.
        row_drops: (episodes,) how many rows of each episode a filter leaves out, by reason.

    Raises:
        DataError: when there are too few episodes for the splits, or no rows for one of them.
    """
    keep = kept_episodes(sequences, episode_drops)
    available = np.where(keep, window.num_rows(sequences.num_states, sequences.num_actions), 0)
    drops = sequences.drops | window.count_drops(sequences.num_states[keep], sequences.num_actions[keep])
    drops |= {reason: int(sequences.num_actions[mask].sum()) for reason, mask in (episode_drops or {}).items()}
    if not keep.any():
        raise DataError(f"no episodes left: the filters leave out all {sequences.num_episodes}: {drops}; relax filters")
    if available.sum() == 0:
        raise DataError(
            f"no transitions left: gap {window.gap}, horizon {window.horizon} and history {window.history} need longer "
            f"episodes; the longest of {sequences.num_episodes} has {sequences.num_states.max()} states"
        )
    if recorded_splits:
        split = given_splits(sequences)
        drops["no_recorded_split"] = int(available[split == NO_SPLIT].sum())
        available = np.where(split == NO_SPLIT, 0, available)
    for reason, dropped in (row_drops or {}).items():
        drops[reason] = int(dropped[available > 0].sum())
    if row_drops:
        available = np.maximum(available - np.sum(list(row_drops.values()), axis=0), 0)
        if available.sum() == 0:
            raise DataError(f"no transitions left: the filters leave out all of them: {drops}; relax filters")
    if not recorded_splits:
        split = split_episodes(sequences, dataset_name, val_ratio, test_ratio, available)
    row_limit = limit_rows(available, split, max_samples)
    drops["max_samples"] = int(available.sum() - row_limit.sum())
    for index, name in enumerate(SPLITS):
        if (split == index).any() and row_limit[split == index].sum() == 0:
            raise DataError(
                f"no transitions left for the {name} split: {drops}; record more episodes, raise --max_samples, or "
                f"set {name}_ratio to 0"
            )
    segments = cut_segments(sequences, split, row_limit, segment_bytes, episodes_with_rows(sequences, window, keep))
    return ExtractionPlan(sequences, window, segments, split, row_limit, drops)


def kept_episodes(sequences: SequencePlan, episode_drops: Mapping[str, Episodes] | None) -> Episodes:
    """Return which episodes no filter leaves out."""
    keep = np.ones(sequences.num_episodes, dtype=bool)
    for mask in (episode_drops or {}).values():
        keep &= ~mask
    return keep


def episodes_with_rows(sequences: SequencePlan, window: Window, keep: Episodes) -> Episodes:
    """Return which of the kept episodes are long enough for a row; the others are never read."""
    return np.asarray(keep & (window.num_rows(sequences.num_states, sequences.num_actions) > 0))


def kept_pieces(sequences: SequencePlan, keep: Episodes) -> Iterator[SequencePlan]:
    """Return the plans of the kept episodes, neighbours within a file together."""
    kept = np.flatnonzero(keep)
    for run in np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1):
        if len(run):
            yield from sequences.slice(int(run[0]), int(run[-1]) + 1).by_file()


def given_splits(sequences: SequencePlan) -> PerEpisode:
    """Return the split that the recording names for each episode, `NO_SPLIT` where it names none.

    Raises:
        DataError: when it names no episode for training.
    """
    given = sequences.given_split
    if given is None or not (given == TRAIN).any():
        named = "none" if given is None else ", ".join(SPLITS[i] for i in np.unique(given[given >= 0])) or "none"
        raise DataError(
            f"splits: recorded needs a recording that names its train episodes; it names {named}; use splits: hashed"
        )
    return given.astype(np.int64)


def split_episodes(
    sequences: SequencePlan, dataset_name: str, val_ratio: float, test_ratio: float, rows: PerEpisode | None = None
) -> PerEpisode:
    """Assign episodes to splits by the rank of a stable hash: the same on any machine, in any file order.

    Validation and test each get their share of the episodes, rounded, at least one where the ratio is above 0. Pieces
    of one recorded episode stay together, and episodes that give no row do not count.

    Args:
        sequences: the recording.
        dataset_name: goes into the hash.
        val_ratio: share for validation.
        test_ratio: share for the test.
        rows: (episodes,) rows that each episode gives; all count when None.

    Returns:
        (episodes,) index into `SPLITS`.

    Raises:
        DataError: when no episode would be left for training.
    """
    counted = range(sequences.num_episodes) if rows is None else np.flatnonzero(rows).tolist()
    names = [sequences.episode_id(episode) for episode in counted]
    unique = dict.fromkeys(names)
    total = len(unique)
    num_val, num_test = (max(1, round(ratio * total)) if ratio > 0 else 0 for ratio in (val_ratio, test_ratio))
    if num_val + num_test >= total:
        raise DataError(
            f"each split needs an episode of its own: {total} episodes cannot give {num_val} to val, {num_test} to "
            "test and one to train; record more, or set val_ratio or test_ratio to 0"
        )
    ranked = sorted(unique, key=lambda name: (_hash(f"{dataset_name}/{name}"), name))
    split_of = dict.fromkeys(ranked[:num_val], VAL) | dict.fromkeys(ranked[num_val : num_val + num_test], TEST)
    split = np.full(sequences.num_episodes, TRAIN, dtype=np.int64)
    split[list(counted)] = [split_of.get(name, TRAIN) for name in names]
    return split


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()


def limit_rows(available: PerEpisode, split: PerEpisode, max_samples: int | None) -> PerEpisode:
    """Return the rows to take of each episode so that all together are min(max_samples, available), exactly.

    Each split gets its share of `max_samples` by the largest-remainder rule, at least one row where it has any and
    `max_samples` allows; within a split the first episodes are used up first.
    """
    total = int(available.sum())
    if max_samples is None or max_samples >= total:
        return available.copy()
    rows = np.array([available[split == index].sum() for index in range(len(SPLITS))])
    share = _apportion(rows, max_samples)
    result = np.zeros_like(available)
    for index, wanted in enumerate(share):
        mine = np.flatnonzero(split == index)
        before = np.cumsum(available[mine]) - available[mine]
        result[mine] = np.clip(wanted - before, 0, available[mine])
    return result


def _apportion(rows: Int[np.ndarray, "splits"], total: int) -> Int[np.ndarray, "splits"]:
    # Python's integers: the product passes 2^63 for a few billion rows, and floats round long before.
    products = [int(count) * total for count in rows]
    share = np.array([product // int(rows.sum()) for product in products], dtype=np.int64)
    remainders = [product % int(rows.sum()) for product in products]
    by_remainder = np.argsort(np.negative(remainders), kind="stable")
    share[by_remainder[: total - int(share.sum())]] += 1
    for empty in np.flatnonzero((share == 0) & (rows > 0)):
        largest = int(share.argmax())
        if share[largest] > 1:
            share[int(empty)] += 1
            share[largest] -= 1
    return share


def cut_segments(
    sequences: SequencePlan, split: PerEpisode, row_limit: PerEpisode, segment_bytes: int, keep: Episodes
) -> tuple[Segment, ...]:
    """Cut the episodes into segments of about `segment_bytes`, counting float64 states and actions.

    Episodes after the last wanted row are left out; small files share a segment, large files are cut between episodes.
    """
    wanted = np.flatnonzero(row_limit)
    stop_all = int(wanted[-1]) + 1
    episode_bytes = 8 * (sequences.num_states * sequences.state_dim + sequences.num_actions * sequences.action_dim)
    ends = np.cumsum(episode_bytes[:stop_all])
    segments: list[Segment] = []
    first = int(wanted[0])
    hashed = 0
    while first < stop_all:
        limit = (ends[first - 1] if first else 0) + segment_bytes
        stop = min(max(int(np.searchsorted(ends, limit, side="right")), first + 1), stop_all)
        stop = min(stop, int(np.searchsorted(sequences.file_index, sequences.file_index[first] + MAX_FILES)))
        if row_limit[first:stop].any():
            first_file, last_file = int(sequences.file_index[first]), int(sequences.file_index[stop - 1])
            hash_files = tuple(range(max(hashed - first_file, 0), last_file - first_file + 1))
            hashed = last_file + 1
            segments.append(
                Segment(
                    index=len(segments),
                    first_episode=first,
                    sequences=sequences.slice(first, stop),
                    split=split[first:stop],
                    row_limit=row_limit[first:stop],
                    keep=keep[first:stop],
                    hash_files=hash_files,
                )
            )
        first = stop
    return tuple(segments)
