"""D4RL: flat arrays in one HDF5 file, episodes delimited by `terminals` and `timeouts`.

The state after row i is `next_observations[i]` where that array is recorded, else `observations[i + 1]`, which at an
episode's end is the next episode's reset: the last row of an episode is then no transition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Bool, Num

from invdyn.errors import DataError
from invdyn.sequences.base import EpisodeArrays, ReadRows, SequencePlan
from invdyn.sequences.boundaries import continues, runs_between, shifted, weave_last
from invdyn.sequences.file_reader import FAIL, FileReader, changed, plan_file
from invdyn.sequences.files import open_hdf5, source_file
from invdyn.sequences.hdf5 import (
    array_shapes,
    check_flags,
    check_rows,
    describe_keys,
    find_hdf5,
    first_readable,
    flat_rows,
    numeric_array,
    side_by_side,
    width,
)

OBSERVATIONS = "observations"
NEXT_OBSERVATIONS = "next_observations"
TERMINALS = "terminals"
TIMEOUTS = "timeouts"
END_KEYS = (TERMINALS, TIMEOUTS)
SCAN_BYTES = 32 * 2**20


class D4rlReader(FileReader):
    """Reads a D4RL file, or a folder of them.

    Args:
        path: file or folder.
        state_keys: arrays that make the state, such as `observations` or `infos/qpos`.
        action_key: array of the actions.
        on_error: `fail` or `skip`.
        episode_ends: the flags that end an episode; by default those of `terminals` and `timeouts` that are there. An
            empty list makes the file one episode: for flags that mark goals while the simulation goes on.
    """

    format_name = "d4rl"
    default_state_keys = (OBSERVATIONS,)

    def __init__(
        self,
        path: str | Path,
        state_keys: Iterable[str] | None = None,
        action_key: str | None = None,
        *,
        on_error: str = FAIL,
        episode_ends: str | Sequence[str] | None = None,
    ):
        super().__init__(path, state_keys, action_key, on_error=on_error)
        self.episode_ends = _names(episode_ends)

    @classmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether the first file has flat arrays of observations and actions, or of flags."""
        first = first_readable(str(path))
        if first is None:
            return False
        with open_hdf5(first) as file:
            flat = [key for key in (OBSERVATIONS, "actions", *END_KEYS) if isinstance(file.get(key), h5py.Dataset)]
            return len(flat) > 1

    def find(self) -> list[str]:
        """Return the HDF5 files."""
        return find_hdf5(self.path)

    def inspect_file(self, path: str) -> SequencePlan:
        """Read the flags; where next observations are recorded, compare them once with the observations."""
        with open_hdf5(path) as file:
            arrays = {key: numeric_array(file, key, path) for key in (*self.state_keys, self.action_key)}
            flags = self._flags(file, path)
            check_rows({name: len(array) for name, array in {**arrays, **flags}.items()}, path)
            total = len(arrays[self.action_key])
            if total == 0:
                raise DataError(f"a recording must hold at least one episode: {path}: its arrays have 0 rows")
            ends = np.zeros(total, dtype=bool)
            for flag in flags.values():
                ends |= flag[()].reshape(-1) != 0
            cuts, warnings = ends, list[str]()
            if self._has_next(file):
                cuts = ends | _breaks(file, path)
                broken = int((cuts & ~ends)[:-1].sum())
                if broken:
                    warnings.append(
                        f"{path}: {NEXT_OBSERVATIONS} is not the observation of the row after it at {broken} rows "
                        "inside episodes; the episodes are cut there, no row is lost"
                    )
            first_row, num_rows = runs_between(cuts)
            episode_index = np.concatenate([[0], np.cumsum(ends)])[first_row]
            return plan_file(
                source_file(path, self.path),
                num_states=num_rows + int(self._has_next(file)),
                num_actions=num_rows,
                dims=(sum(width(arrays[key].shape) for key in self.state_keys), width(arrays[self.action_key].shape)),
                episode_index=episode_index,
                first_row=first_row,
                warnings=warnings,
            )

    @contextmanager
    def open(self, plan: SequencePlan) -> Iterator[ReadRows]:
        """Open the file; each array of a range is one slice. Recorded next observations are read at once."""
        path = plan.files[plan.file_index[0]].path
        assert plan.first_row is not None
        first, total = int(plan.first_row[0]), int(plan.num_actions.sum())
        if int(plan.first_row[-1] + plan.num_actions[-1]) - first != total:
            raise changed(path)
        with open_hdf5(path) as file:
            has_next = self._has_next(file)
            if total + len(plan.num_actions) * has_next != plan.num_states.sum():
                raise changed(path)

            def read_states(rows: slice) -> Num[np.ndarray, "rows dim"]:
                return side_by_side([_slice(file, key, shifted(rows, first), path) for key in self.state_keys])

            if has_next:
                next_states = _slice(file, NEXT_OBSERVATIONS, slice(first, first + total), path)
                woven = weave_last(read_states(slice(0, total)), next_states, plan.num_actions)
                del next_states
            yield lambda states, actions: EpisodeArrays(
                woven[states] if has_next else read_states(states),
                _slice(file, self.action_key, shifted(actions, first), path),
            )

    def _has_next(self, file: h5py.File) -> bool:
        return self.state_keys == (OBSERVATIONS,) and isinstance(file.get(NEXT_OBSERVATIONS), h5py.Dataset)

    def _flags(self, file: h5py.File, path: str) -> dict[str, h5py.Dataset]:
        wanted = self.episode_ends
        if wanted is None:
            wanted = tuple(key for key in END_KEYS if key in file)
        if not wanted and self.episode_ends is None:
            raise DataError(
                f"not a d4rl recording: {path} has neither {TERMINALS!r} nor {TIMEOUTS!r}, so its episodes cannot be "
                f"told apart; found {describe_keys(array_shapes(file))}; set format_options.episode_ends"
            )
        flags = {key: numeric_array(file, key, path) for key in wanted}
        for key, array in flags.items():
            check_flags(array.shape, key, path)
        return flags


def _names(names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (names,) if isinstance(names, str) else None if names is None else tuple(names)


def _breaks(file: h5py.File, path: str) -> Bool[np.ndarray, "rows"]:
    """Return the rows whose next observation is not the observation of the row after, in bounded memory."""
    states = numeric_array(file, OBSERVATIONS, path)
    next_states = numeric_array(file, NEXT_OBSERVATIONS, path)
    if states.shape != next_states.shape:
        raise DataError(
            f"lengths disagree: {path}: {OBSERVATIONS} {states.shape} and {NEXT_OBSERVATIONS} {next_states.shape} must "
            "have the same shape"
        )
    total = len(states)
    breaks = np.zeros(total, dtype=bool)
    block = max(SCAN_BYTES // max(width(states.shape) * states.dtype.itemsize, 1), 2)
    for first in range(0, total - 1, block):
        stop = min(first + block, total - 1)
        now = flat_rows(states[first : stop + 1])
        after = flat_rows(next_states[first : stop + 1])
        breaks[first:stop] = ~continues(after, now)
    return breaks


def _slice(file: h5py.File, key: str, rows: slice, path: str) -> Num[np.ndarray, "rows dim"]:
    values = numeric_array(file, key, path)[rows]
    if len(values) != rows.stop - rows.start:
        raise changed(path)
    return flat_rows(values)
