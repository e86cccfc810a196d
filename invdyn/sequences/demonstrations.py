"""One demonstration of a robomimic file: `actions`, `obs/<key>` and perhaps `next_obs/<key>` or `states`.

When a key's value at step t was taken decides which transitions there are:

- `obs/<key>` before step t; with `next_obs/<key>`, N transitions, else N - 1.
- `states` before step t (robomimic), or, as a group (Isaac Lab), after it: `initial_state` then holds the first one.
"""

from __future__ import annotations

from dataclasses import dataclass

import h5py
import numpy as np
from jaxtyping import Num

from invdyn.sequences.base import Index
from invdyn.sequences.boundaries import continues, runs_where
from invdyn.sequences.hdf5 import check_rows, flat_rows, numeric_array, side_by_side, vector_keys, width

OBS = "obs"
NEXT_OBS = "next_obs"
STATES = "states"
INITIAL_STATE = "initial_state"
COPIED_NEXT_OBS = "last_next_obs_is_copy_of_obs"
NO_STATE_BEFORE = "no_state_before_action"


@dataclass(frozen=True)
class Pieces:
    """What one demonstration gives: usually one piece, more where next observations do not chain."""

    first_row: Index
    num_states: Index
    num_actions: Index
    dims: tuple[int, int]
    drops: dict[str, int]
    warnings: list[str]
    success: int


@dataclass(frozen=True)
class Track:
    """Where a state key's values lie in a demonstration, and which steps they belong to.

    Attributes:
        name: path of the values within the demonstration.
        initial: path of the value before the first step, when `name` holds those after each step.
        after_step: whether row t was taken after step t, not before it.
    """

    name: str
    initial: str | None = None
    after_step: bool = False

    @property
    def first(self) -> int:
        """First known state: s_0 is known unless values are taken after the step and no initial one is recorded."""
        return int(self.after_step and self.initial is None)

    def last(self, num_rows: int) -> int:
        """Last known state of `num_rows` rows."""
        return num_rows if self.after_step else num_rows - 1

    def read(self, demo: h5py.Group, first: int, count: int) -> Num[np.ndarray, "states dim"]:
        """Read the states s_first and on, (count, dim)."""
        if not self.after_step:
            return flat_rows(demo[self.name][first : first + count])
        if first > 0 or self.initial is None:
            return flat_rows(demo[self.name][first - 1 : first - 1 + count])
        rows = flat_rows(demo[self.name][: count - 1])
        return np.concatenate([np.asarray(demo[self.initial][()]).reshape(1, -1), rows])


def measure(demo: h5py.Group, keys: tuple[str, ...], action_key: str, where: str) -> Pieces:
    """Return the pieces of a demonstration.

    Args:
        demo: its group.
        keys: paths of the state keys within it.
        action_key: path of the actions within it.
        where: file and name, for errors.

    Raises:
        DataError: when a key is missing or not numeric, or lengths disagree.
    """
    arrays = {key: numeric_array(demo, key, where) for key in (*keys, action_key)}
    check_rows({key: len(array) for key, array in arrays.items()}, where)
    num_rows = len(arrays[action_key])
    warnings = []
    # By name: other attributes can be large, such as the simulator's model.
    stated, succeeded = demo.attrs.get("num_samples"), demo.attrs.get("success")
    if stated is not None and int(stated) != num_rows:
        warnings.append(f"{where}: num_samples says {int(stated)}, the arrays have {num_rows} rows; the rows are used")
    dims = sum(width(arrays[key].shape) for key in keys), width(arrays[action_key].shape)
    success = -1 if succeeded is None else int(bool(succeeded))
    if _all_have_next(demo, keys):
        states = [arrays[key] for key in keys]
        nexts = [numeric_array(demo, _next_key(key), where) for key in keys]
        check_rows({keys[0]: num_rows, **{_next_key(k): len(a) for k, a in zip(keys, nexts, strict=True)}}, where)
        first_row, counts, chained = _cut_rows(demo, states, nexts, num_rows)
        if not chained:
            warnings.append(f"{where}: next_obs is not always the obs of the row after it; the episode is cut there")
        drops = {COPIED_NEXT_OBS: num_rows - int(counts.sum())}
        return Pieces(first_row, counts + 1, counts, dims, drops, warnings, success)
    tracks = [_track(demo, key) for key in keys]
    first = max(track.first for track in tracks)
    last = min(track.last(num_rows) for track in tracks)
    num_states = np.array([max(last - first + 1, 0)])
    num_actions = np.array([max(min(num_rows, last + 1) - first, 0)])
    drops = {NO_STATE_BEFORE: min(first, num_rows)}
    return Pieces(np.array([first]), num_states, num_actions, dims, drops, warnings, success)


def read_states(
    demo: h5py.Group, keys: tuple[str, ...], first: int, num_states: int, num_actions: int
) -> Num[np.ndarray, "states dim"]:
    """Read the states of a piece, (num_states, dim)."""
    # Only `obs` with `next_obs` has a state more than actions; without, the last action has no next state.
    if num_states == num_actions or any(key.startswith(f"{STATES}/") for key in keys):
        return side_by_side([_track(demo, key).read(demo, first, num_states) for key in keys])
    rows = slice(first, first + num_actions)
    states = side_by_side([flat_rows(demo[key][rows]) for key in keys])
    last = side_by_side([flat_rows(demo[_next_key(key)][rows.stop - 1 : rows.stop]) for key in keys])
    return np.concatenate([states, last])


def _cut_rows(
    demo: h5py.Group, states: list[h5py.Dataset], nexts: list[h5py.Dataset], num_rows: int
) -> tuple[Index, Index, bool]:
    """Cut rows where next observations do not chain, and drop a last one that is a copy.

    Returns:
        First row and number of rows of each piece, and whether all rows chain.
    """
    keep, ends = np.ones(num_rows, dtype=bool), np.zeros(num_rows, dtype=bool)
    if num_rows:
        now = side_by_side([flat_rows(array[()]) for array in states])
        after = side_by_side([flat_rows(array[()]) for array in nexts])
        ends[:-1] = ~continues(after, now)
        keep[-1] = not (np.array_equal(now[-1], after[-1]) and _last_is_copy(demo))
    return *runs_where(keep, ends), not ends.any()


def _last_is_copy(demo: h5py.Group) -> bool:
    """Return whether the last `next_obs` equals the last `obs` in every vector key: some converters fill it so."""
    names = [name for name in vector_keys(demo[NEXT_OBS]) if isinstance(demo[OBS].get(name), h5py.Dataset)]
    pairs = ((demo[f"{OBS}/{name}"], demo[f"{NEXT_OBS}/{name}"]) for name in names)
    return all(len(now) and len(after) and bool(np.all(now[-1] == after[-1])) for now, after in pairs)


def _track(demo: h5py.Group, key: str) -> Track:
    """Find out when a key's values were taken: Isaac Lab keeps `states` as a tree, after the step."""
    if not key.startswith(f"{STATES}/"):
        return Track(key)
    initial = f"{INITIAL_STATE}/{key.partition('/')[2]}"
    return Track(key, initial if isinstance(demo.get(initial), h5py.Dataset) else None, after_step=True)


def _next_key(key: str) -> str:
    return f"{NEXT_OBS}/{key.removeprefix(f'{OBS}/')}"


def _all_have_next(demo: h5py.Group, keys: tuple[str, ...]) -> bool:
    return all(key.startswith(f"{OBS}/") and isinstance(demo.get(_next_key(key)), h5py.Dataset) for key in keys)
