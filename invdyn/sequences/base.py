"""The one interface to recordings: a cheap plan first, then arrays of consecutive episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int, Num

from invdyn.errors import DataError

GIVEN_SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What recordings call them."""

EPISODE_COLUMNS = ("episode_index", "num_states", "num_actions", "first_row", "given_split", "success")

Index = Int[np.ndarray, "episodes"]


@dataclass(frozen=True)
class SourceFile:
    """A file that episodes come from.

    Attributes:
        path: absolute path.
        name: path relative to the recording's folder; it is part of each episode's identity, so the same recording in
            another place splits the same way.
        size: bytes.
        version: a number that is another one when it or one of its parts is written again, as of `FileStatus`.
        parts: absolute paths of further files that belong to it, such as the actions of a CSV episode.
        rows: rows of `path` and of each of `parts`, where they are counted on from one to the next; else empty.
    """

    path: str
    name: str
    size: int
    version: int
    parts: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class SequencePlan:
    """What a recording holds, learnt without reading its arrays.

    Episodes are in reading order; those of one file are neighbours. All per-episode columns are (episodes,) int64.

    Attributes:
        files: the source files.
        file_index: which file each episode is in.
        episode_index: the episode's number within its file. Pieces of one episode that do not join share its number.
        num_states: recorded states.
        num_actions: recorded actions that act on a recorded state; `num_states` or `num_states - 1`.
        state_dim: numbers in a state.
        action_dim: numbers in an action.
        attributes: facts that the recording states about itself (environment, time step in seconds).
        first_row: where each episode starts in its file (or in its group of the file), for formats that need it.
        given_split: the split that the recording names for each episode, an index into `GIVEN_SPLITS`; -1 for none.
        success: 1 where the recording says that the episode succeeded, 0 where it failed, -1 where it says nothing.
        drops: recorded rows that are no transitions and are in no episode of this plan, by reason.
        warnings: where the recording contradicts itself; one line each.
        skipped: files left out because they cannot be read, and why.
    """

    files: tuple[SourceFile, ...]
    file_index: Index
    episode_index: Index
    num_states: Index
    num_actions: Index
    state_dim: int
    action_dim: int
    attributes: dict[str, str | float]
    first_row: Index | None = None
    given_split: Index | None = None
    success: Index | None = None
    drops: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def dims(self) -> tuple[int, int]:
        """(state_dim, action_dim)."""
        return self.state_dim, self.action_dim

    @property
    def num_episodes(self) -> int:
        """Number of episodes in all files."""
        return len(self.file_index)

    def episode_id(self, episode: int) -> str:
        """Return the stable identity of an episode: file name and number within the file."""
        return f"{self.files[self.file_index[episode]].name}:{self.episode_index[episode]}"

    def path_of(self, episode: int, step: int) -> str:
        """Return the path of the file on disk that holds a step of an episode."""
        file: SourceFile = self.files[self.file_index[episode]]
        if len(file.rows) < 2:
            return file.path
        assert self.first_row is not None
        part = int(np.searchsorted(np.cumsum(file.rows), self.first_row[episode] + step, side="right"))
        return (file.path, *file.parts)[part]

    def slice(self, first: int, stop: int) -> SequencePlan:
        """Return the plan of the episodes `first` to `stop` (exclusive) and their files alone."""
        columns = {name: getattr(self, name) for name in EPISODE_COLUMNS}
        first_file, last_file = int(self.file_index[first]), int(self.file_index[stop - 1])
        return replace(
            self,
            files=self.files[first_file : last_file + 1],
            file_index=self.file_index[first:stop] - first_file,
            **{name: column[first:stop] for name, column in columns.items() if column is not None},
            # Facts about the whole recording: a part of it must not count them again.
            drops={},
            warnings=(),
            skipped={},
        )

    def by_file(self) -> list[SequencePlan]:
        """Return one plan per file, in order."""
        cuts = [0, *(np.flatnonzero(np.diff(self.file_index)) + 1).tolist(), self.num_episodes]
        return [self.slice(first, stop) for first, stop in pairwise(cuts)]

    def __repr__(self) -> str:
        return (
            f"SequencePlan({len(self.files)} files, {self.num_episodes} episodes, {int(self.num_actions.sum())} "
            f"actions, state ({self.state_dim},), action ({self.action_dim},))"
        )


@dataclass(frozen=True)
class EpisodeArrays:
    """Consecutive episodes laid end to end.

    Attributes:
        state: (sum of num_states, state_dim), any float type.
        action: (sum of num_actions, action_dim), any float type.
    """

    state: Num[np.ndarray, "states state_dim"]
    action: Num[np.ndarray, "actions action_dim"]

    def __repr__(self) -> str:
        return f"EpisodeArrays(state {self.state.shape}, action {self.action.shape})"


ReadRows = Callable[[slice, slice], EpisodeArrays]
"""Reads (states, actions): ranges of rows, counted from the first of a plan's episodes."""


class SequenceReader(ABC):
    """Reads one format. Holds paths and keys only, so that it travels to workers cheaply."""

    format_name: str
    skips_damaged = False
    """Whether files that cannot be used are left out; otherwise the first is an error."""

    @classmethod
    @abstractmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether the files at `path` look like this format; damaged ones may, so that their error is told."""

    def source_paths(self, file: SourceFile) -> list[str]:
        """Return all files on disk that a source file consists of, in a fixed order."""
        return [file.path, *file.parts]

    @abstractmethod
    def inspect(self, without: Mapping[str, str] | None = None) -> SequencePlan:
        """Find files, episodes and lengths without reading array data.

        Args:
            without: files on disk found to be damaged when they were read: path and reason. They are left out where
                damaged files are skipped, as if this call had found the damage.

        Raises:
            DataError: when a file is missing, unreadable, or its lengths disagree.
        """

    def read(self, plan: SequencePlan) -> EpisodeArrays:
        """Read the episodes of a plan, consecutive within one file, in a few large reads.

        A format defines this, or `open` where its files allow ranges of rows to be read on their own.

        Raises:
            DataError: when the file no longer holds what the plan says.
        """
        with self.open(plan) as read:
            return read(slice(0, int(plan.num_states.sum())), slice(0, int(plan.num_actions.sum())))

    @contextmanager
    def open(self, plan: SequencePlan) -> Iterator[ReadRows]:
        """Open the file of a plan to read ranges of its rows, one after another; here they are read at once.

        Raises:
            DataError: when the file no longer holds what the plan says; reading raises it too.
        """
        arrays = self.read(plan)
        yield lambda states, actions: EpisodeArrays(arrays.state[states], arrays.action[actions])


def all_finite(arrays: EpisodeArrays) -> bool:
    """Return whether all states and actions are surely finite as float32; when not, `check_finite` tells.

    A sum is finite only when all terms are, and far cheaper than a mask. It may overflow where no term does.
    """
    return all(_sum_is_finite(values) for values in (arrays.state, arrays.action))


def _sum_is_finite(values: Num[np.ndarray, "rows columns"]) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):  # each term is converted before it is added
        return bool(np.issubdtype(values.dtype, np.integer) or np.isfinite(values.sum(dtype=np.float32)))


def check_finite(arrays: EpisodeArrays, plan: SequencePlan, first_step: int = 0) -> None:
    """Check that no state or action is NaN or infinite, nor becomes so as float32, which transitions are stored in.

    Args:
        arrays: the episodes of the plan, the first of them from `first_step` on.
        plan: names the episodes.
        first_step: steps of the first episode that the plan and the arrays leave out.

    Raises:
        DataError: naming file, episode and step of the first one.
    """
    for name, values, lengths in (
        ("state", arrays.state, plan.num_states),
        ("action", arrays.action, plan.num_actions),
    ):
        if _sum_is_finite(values):
            continue
        with np.errstate(over="ignore"):
            finite = np.isfinite(values.astype(np.float32))
        bad = np.flatnonzero(~finite.all(axis=1))
        if len(bad):
            ends = np.cumsum(lengths)
            episode = int(np.searchsorted(ends, bad[0], side="right"))
            step = int(bad[0] - (ends[episode] - lengths[episode])) + (first_step if episode == 0 else 0)
            column = int(np.flatnonzero(~finite[bad[0]])[0])
            value, path = values[bad[0], column], plan.path_of(episode, step)
            raise DataError(
                f"states and actions must be finite{' as float32' if np.isfinite(value) else ''}: {path}: {name} "
                f"holds {value} in column {column} at episode {plan.episode_index[episode]}, step {step} "
                f"({len(bad)} such rows in {len(values)} read); leave it out with filters: {{episodes: {{exclude: "
                f"['{plan.episode_id(episode)}']}}}}, or record it again"
            )
