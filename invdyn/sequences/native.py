"""invdyn's own recordings: replay-buffer HDF5 shards, as `experiments/collect.py` writes them.

`data/<key>` (N, ...) for observation keys, `data/action` (N, action_dim), `meta/episode_ends` (E,) int64 cumulative
exclusive over actions, and `meta/state_ends` (E,) the same over states, of which an episode has one more than actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from invdyn import storage
from invdyn.errors import DataError
from invdyn.sequences.base import EpisodeArrays, Index, ReadRows, SequencePlan
from invdyn.sequences.boundaries import shifted
from invdyn.sequences.file_reader import FileReader, changed, plan_file
from invdyn.sequences.files import HDF5_SUFFIXES, open_hdf5, source_file
from invdyn.sequences.hdf5 import (
    array_shapes,
    attributes,
    describe_keys,
    find_hdf5,
    first_readable,
    flat_rows,
    numeric_array,
    side_by_side,
    width,
)

STATE_KEY = "state"
ACTION_KEY = "action"
DATA_GROUP = "data"
EPISODE_ENDS = "meta/episode_ends"
STATE_ENDS = "meta/state_ends"
COLLECTING_MARKER = ".collecting.json"


class NativeReader(FileReader):
    """Reads a folder of native shards, or a single shard.

    Args:
        path: folder or file.
        state_keys: arrays in `data` that make the state.
        action_key: array in `data` of the actions.
        on_error: `fail` or `skip`.
    """

    format_name = "native"
    default_state_keys = (STATE_KEY,)
    default_action_key = ACTION_KEY
    where_it_comes_from = "make it with experiments/collect.py or set buffer_path"

    @classmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether the first readable shard at `path` has this layout."""
        first = first_readable(str(path))
        if first is None:
            return False
        with open_hdf5(first) as file:
            return DATA_GROUP in file and EPISODE_ENDS in file

    def find(self) -> list[str]:
        """Return the shards."""
        if storage.exists(storage.join(self.path, COLLECTING_MARKER)):
            raise DataError(
                f"recording is unfinished: {self.path} holds {COLLECTING_MARKER}; run experiments/collect.py again"
            )
        shards = find_hdf5(self.path)
        if not shards:
            raise DataError(f"recording has no shards: no file ending in {' or '.join(HDF5_SUFFIXES)} in {self.path}")
        return shards

    def inspect_file(self, path: str) -> SequencePlan:
        """Read the episode ends of a shard."""
        with open_hdf5(path) as file:
            action_ends, state_ends = _ends(file, path)
            keys = (*self.state_keys, self.action_key)
            arrays = {key: numeric_array(file, f"{DATA_GROUP}/{key}", path) for key in keys}
            for key, array in arrays.items():
                ends, name = (action_ends, EPISODE_ENDS) if key == self.action_key else (state_ends, STATE_ENDS)
                if len(array) != ends[-1]:
                    raise DataError(
                        f"lengths disagree: {path}: {DATA_GROUP}/{key} has {len(array)} rows, {name} ends at {ends[-1]}"
                    )
            num_states, num_actions = np.diff(state_ends), np.diff(action_ends)
            _check_lengths(num_states, num_actions, path)
            return plan_file(
                source_file(path, self.path),
                num_states=num_states,
                num_actions=num_actions,
                dims=(sum(width(arrays[key].shape) for key in self.state_keys), width(arrays[self.action_key].shape)),
                attributes=attributes(file.attrs),
            )

    @contextmanager
    def open(self, plan: SequencePlan) -> Iterator[ReadRows]:
        """Open the shard; each array of a range is one slice."""
        path = plan.files[plan.file_index[0]].path
        first, last = int(plan.episode_index[0]), int(plan.episode_index[-1])
        with open_hdf5(path) as file:
            action_ends, state_ends = _ends(file, path)
            found = [np.diff(ends[first : last + 2]) for ends in (state_ends, action_ends)]
            if not (np.array_equal(found[0], plan.num_states) and np.array_equal(found[1], plan.num_actions)):
                raise changed(path)
            states = [file[f"{DATA_GROUP}/{key}"] for key in self.state_keys]
            actions = file[f"{DATA_GROUP}/{self.action_key}"]

            def read(state_rows: slice, action_rows: slice) -> EpisodeArrays:
                found = [flat_rows(rows[shifted(state_rows, int(state_ends[first]))]) for rows in states]
                return EpisodeArrays(
                    side_by_side(found), flat_rows(actions[shifted(action_rows, int(action_ends[first]))])
                )

            yield read


def _check_lengths(num_states: Index, num_actions: Index, path: str) -> None:
    wrong = np.flatnonzero((num_states != num_actions + 1) & (num_states != num_actions))
    if len(wrong):
        raise DataError(
            f"lengths disagree: {path}: episode {wrong[0]} has {num_states[wrong[0]]} states and "
            f"{num_actions[wrong[0]]} actions; T actions need T + 1 states (or T, the last action then unused)"
        )
    short = np.flatnonzero((num_states < 2) | (num_actions < 1))
    if len(short):
        raise DataError(
            f"an episode must hold at least 2 states and 1 action: {path}: episode {short[0]} has "
            f"{num_states[short[0]]} states and {num_actions[short[0]]} actions ({len(short)} such episodes); "
            "remove it from the recording"
        )


def _ends(file: h5py.File, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the cumulative ends of actions and states with a leading 0, each (episodes + 1,)."""
    # Every look-up of a name costs as much as a small read: each once.
    found = {name: file.get(name) for name in (EPISODE_ENDS, STATE_ENDS)}
    if found[EPISODE_ENDS] is None or DATA_GROUP not in file:
        missing = EPISODE_ENDS if found[EPISODE_ENDS] is None else DATA_GROUP
        raise DataError(f"not a native recording: {path} has no {missing!r}; found {describe_keys(array_shapes(file))}")
    action_ends = _cumulative(file, EPISODE_ENDS, found[EPISODE_ENDS], path)
    if found[STATE_ENDS] is None:
        return action_ends, action_ends
    state_ends = _cumulative(file, STATE_ENDS, found[STATE_ENDS], path)
    if len(action_ends) != len(state_ends):
        raise DataError(
            f"lengths disagree: {path}: {EPISODE_ENDS} has {len(action_ends) - 1} episodes, {STATE_ENDS} "
            f"{len(state_ends) - 1}"
        )
    return action_ends, state_ends


def _cumulative(file: h5py.File, name: str, dataset: object, path: str) -> np.ndarray:
    if not isinstance(dataset, h5py.Dataset) or not np.issubdtype(dataset.dtype, np.integer) or dataset.ndim != 1:
        raise DataError(f"{name} must be a list of whole numbers: {path} holds {describe_keys(array_shapes(file))}")
    ends = np.concatenate([[0], dataset[()].astype(np.int64)])
    wrong = np.flatnonzero(np.diff(ends) < 0)
    if len(wrong):
        raise DataError(
            f"{name} must not decrease: {path}: episode {wrong[0]} ends at {ends[wrong[0] + 1]}, the one before at "
            f"{ends[wrong[0]]}"
        )
    return ends
