"""robomimic: one HDF5 group per demonstration, `data/demo_<i>`, with `actions`, `obs/<key>`, perhaps `next_obs/<key>`.

When a key's value at step t was taken differs, and decides which transitions there are:

- `obs/<key>` before step t; with `next_obs/<key>`, N transitions, else N - 1.
- `states` before step t (robomimic), or, as a group (Isaac Lab), after it: `initial_state` then holds the first one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Num

from invdyn.errors import DataError
from invdyn.sequences.base import GIVEN_SPLITS, EpisodeArrays, Index, SequencePlan
from invdyn.sequences.boundaries import continues, runs_where
from invdyn.sequences.file_reader import FAIL, FileReader, changed, plan_file
from invdyn.sequences.files import natural_key, open_hdf5, source_file
from invdyn.sequences.hdf5 import (
    array_shapes,
    attributes,
    check_rows,
    describe_keys,
    find_hdf5,
    first_readable,
    flat_rows,
    numeric_array,
    only_key,
    side_by_side,
    vector_keys,
    width,
)

DATA_GROUP = "data"
MASK_GROUP = "mask"
OBS = "obs"
NEXT_OBS = "next_obs"
STATES = "states"
INITIAL_STATE = "initial_state"
DEMO_NAME = re.compile(r"demo_(\d+)")
SPLIT_OF_MASK = {"train": "train", "valid": "val", "val": "val", "validation": "val", "test": "test"}
PREVIOUS_ACTION_KEYS = ("actions", "action", "last_action", "prev_actions")

COPIED_NEXT_OBS = "last_next_obs_is_copy_of_obs"
NO_STATE_BEFORE = "no_state_before_action"
NOT_IN_MASK = "not_in_mask"


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


class RobomimicReader(FileReader):
    """Reads a robomimic file, or a folder of them; the Isaac Lab variant too.

    Args:
        path: file or folder.
        state_keys: names in `obs`, or paths within a demonstration such as `states`; may be left out when `obs` holds
            a single vector.
        action_key: array of the actions.
        on_error: `fail` or `skip`.
        demo_group: the group that holds the demonstrations; `/` for the root.
        mask: read only the demonstrations that `mask/<this>` names.
    """

    format_name = "robomimic"

    def __init__(
        self,
        path: str | Path,
        state_keys: Iterable[str] | None = None,
        action_key: str | None = None,
        *,
        on_error: str = FAIL,
        demo_group: str = DATA_GROUP,
        mask: str | None = None,
    ):
        super().__init__(path, state_keys, action_key, on_error=on_error)
        self.demo_group = demo_group
        self.mask = mask

    @classmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether the first file has demonstrations, or an empty group for them."""
        first = first_readable(str(path))
        if first is None:
            return False
        with open_hdf5(first) as file:
            data = file.get(DATA_GROUP)
            groups = [group for group in (data, file) if isinstance(group, h5py.Group)]
            empty = isinstance(data, h5py.Group) and "total" in data.attrs
            return empty or any(next(_demo_names(group), None) for group in groups)

    def find(self) -> list[str]:
        """Return the HDF5 files."""
        return find_hdf5(self.path)

    def inspect_file(self, path: str) -> SequencePlan:
        """Measure every demonstration; where next observations are recorded, compare them with the observations."""
        with open_hdf5(path) as file:
            demos = self._demos(file, path)
            kept, masks = self._kept(file, demos, path)
            pieces = [self._inspect_demo(demos[name], f"{path}: {name}") for name in kept]
            split = _given_split(masks, kept, self.mask, path)
            drops: dict[str, int] = {
                NOT_IN_MASK: sum(_num_rows(demos[n], self.action_key) for n in demos if n not in kept)
            }
            for piece in pieces:
                for reason, count in piece.drops.items():
                    drops[reason] = drops.get(reason, 0) + count
            counts = np.array([len(piece.first_row) for piece in pieces])
            success = np.array([_success(demos[name]) for name in kept])
            return plan_file(
                source_file(path, self.path),
                num_states=np.concatenate([piece.num_states for piece in pieces]),
                num_actions=np.concatenate([piece.num_actions for piece in pieces]),
                dims=_same_dims([piece.dims for piece in pieces], kept, path),
                episode_index=np.repeat([_number(name) for name in kept], counts),
                first_row=np.concatenate([piece.first_row for piece in pieces]),
                given_split=None if split is None else np.repeat(split, counts),
                success=np.repeat(success, counts) if (success >= 0).any() else None,
                drops=drops,
                warnings=self._warnings(path, pieces),
                attributes=_facts(file.get(self.demo_group)),
            )

    def read(self, plan: SequencePlan) -> EpisodeArrays:
        """Read one slice per array and piece of a demonstration."""
        path = plan.files[plan.file_index[0]].path
        assert plan.first_row is not None
        states, actions = [], []
        with open_hdf5(path) as file:
            demos = self._demos(file, path)
            by_number = {_number(name): demo for name, demo in demos.items()}
            columns = (plan.episode_index, plan.first_row, plan.num_states, plan.num_actions)
            for number, first, num_states, num_actions in zip(*(c.tolist() for c in columns), strict=True):
                if number not in by_number:
                    raise changed(path)
                demo = by_number[number]
                keys = self._keys(demo, f"{path}: demo_{number}")
                states.append(_read_states(demo, keys, first, num_states, num_actions))
                actions.append(flat_rows(demo[self.action_key][first : first + num_actions]))
                if (len(states[-1]), len(actions[-1])) != (num_states, num_actions):
                    raise changed(path)
        return EpisodeArrays(np.concatenate(states), np.concatenate(actions))

    def _demos(self, file: h5py.File, path: str) -> dict[str, h5py.Group]:
        """Return the demonstrations in the order of their numbers."""
        group = file.get(self.demo_group)
        demos = sorted(_demo_names(group), key=natural_key) if isinstance(group, h5py.Group) else []
        if demos:
            return {name: group[name] for name in demos}
        at_root = sorted(_demo_names(file), key=natural_key)
        if at_root:
            raise _demos_at_root(file, at_root, self.demo_group, path)
        found = f"found {describe_keys(array_shapes(file))}"
        if isinstance(group, h5py.Group):
            raise DataError(
                f"a recording must hold at least one episode: {path}: group {self.demo_group!r} has no demo_<number>; "
                f"{found}; set format_options.demo_group if they are elsewhere"
            )
        raise DataError(
            f"not a robomimic recording: {path} has no group {self.demo_group!r}; {found}; set format, or "
            "format_options.demo_group"
        )

    def _kept(self, file: h5py.File, demos: dict[str, h5py.Group], path: str) -> tuple[list[str], dict[str, set[str]]]:
        """Return the demonstrations to read, and the names in each mask."""
        group = file.get(MASK_GROUP)
        masks = {
            name: {value.decode() if isinstance(value, bytes) else str(value) for value in group[name][()].reshape(-1)}
            for name in (group or ())
            if isinstance(group[name], h5py.Dataset)
        }
        if self.mask is None:
            return list(demos), masks
        if self.mask not in masks:
            raise DataError(f"mask {self.mask!r} is missing: {path}: found {', '.join(sorted(masks)) or 'no masks'}")
        kept = [name for name in demos if name in masks[self.mask]]
        if not kept:
            raise DataError(f"mask {self.mask!r} must name a demonstration of the file: {path}: it names none")
        return kept, masks

    def _keys(self, demo: h5py.Group, where: str) -> tuple[str, ...]:
        """Return the paths of the state keys within a demonstration."""
        obs = demo.get(OBS)
        if self.state_keys is not None:
            in_obs = obs if isinstance(obs, h5py.Group) else ()
            return tuple(f"{OBS}/{key}" if key in in_obs else key for key in self.state_keys)
        only = only_key(obs)
        if only is not None:
            return (f"{OBS}/{only}",)
        raise DataError(
            f"shape_meta.obs must name the keys of the state: {where}: there is no single choice; found "
            f"{describe_keys(array_shapes(demo))}"
        )

    def _inspect_demo(self, demo: h5py.Group, where: str) -> Pieces:
        keys = self._keys(demo, where)
        arrays = {key: numeric_array(demo, key, where) for key in (*keys, self.action_key)}
        check_rows({key: len(array) for key, array in arrays.items()}, where)
        num_rows = len(arrays[self.action_key])
        dims = sum(width(arrays[key].shape) for key in keys), width(arrays[self.action_key].shape)
        warnings = []
        stated = demo.attrs.get("num_samples")
        if stated is not None and int(stated) != num_rows:
            warnings = [f"{where}: num_samples says {int(stated)}, the arrays have {num_rows} rows; the rows are used"]
        if _all_have_next(demo, keys):
            return _pieces_of_rows(demo, keys, num_rows, dims, warnings, where)
        tracks = [_track(demo, key) for key in keys]
        first = max(track.first for track in tracks)
        last = min(track.last(num_rows) for track in tracks)
        num_states = max(last - first + 1, 0)
        num_actions = max(min(num_rows, last + 1) - first, 0)
        return Pieces(
            first_row=np.array([first]),
            num_states=np.array([num_states]),
            num_actions=np.array([num_actions]),
            dims=dims,
            drops={NO_STATE_BEFORE: min(first, num_rows)},
            warnings=warnings,
        )

    def _warnings(self, path: str, pieces: list[Pieces]) -> list[str]:
        warnings = [line for piece in pieces for line in piece.warnings]
        leaks = [key for key in self.state_keys or () if key.rpartition("/")[2] in PREVIOUS_ACTION_KEYS]
        if leaks:
            warnings.append(
                f"{path}: state key {', '.join(leaks)} holds the previous action by its name: with a history or a gap "
                "above 1 the label leaks into the input; leave it out of shape_meta.obs"
            )
        return warnings


@dataclass(frozen=True)
class Pieces:
    """What one demonstration gives: usually one piece, more where next observations do not chain."""

    first_row: Index
    num_states: Index
    num_actions: Index
    dims: tuple[int, int]
    drops: dict[str, int]
    warnings: list[str]


def _demo_names(group: h5py.Group) -> Iterator[str]:
    return (name for name in group if DEMO_NAME.fullmatch(name))


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _num_rows(demo: h5py.Group, key: str) -> int:
    array = demo.get(key)
    return int(array.shape[0]) if isinstance(array, h5py.Dataset) and array.shape else 0


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


def _pieces_of_rows(
    demo: h5py.Group, keys: tuple[str, ...], num_rows: int, dims: tuple[int, int], warnings: list[str], where: str
) -> Pieces:
    """Cut a demonstration with next observations where they do not chain, and drop a last one that is a copy."""
    nexts = {_next_key(key): numeric_array(demo, _next_key(key), where) for key in keys}
    check_rows({keys[0]: num_rows, **{key: len(array) for key, array in nexts.items()}}, where)
    keep, ends = np.ones(num_rows, dtype=bool), np.zeros(num_rows, dtype=bool)
    if num_rows:
        chained = np.ones(num_rows - 1, dtype=bool)
        for key in keys:
            chained &= continues(flat_rows(demo[_next_key(key)][()]), flat_rows(demo[key][()]))
        ends[:-1] = ~chained
        keep[-1] = not _last_is_copy(demo)
        if not chained.all():
            warnings.append(
                f"{where}: next_obs is not the obs of the row after it at {int((~chained).sum())} rows; the episode is "
                "cut there, no row is lost"
            )
    first_row, counts = runs_where(keep, ends)
    return Pieces(first_row, counts + 1, counts, dims, {COPIED_NEXT_OBS: int((~keep).sum())}, warnings)


def _last_is_copy(demo: h5py.Group) -> bool:
    """Return whether the last `next_obs` equals the last `obs` in every vector key: some converters fill it so."""
    names = [name for name in vector_keys(demo[NEXT_OBS]) if isinstance(demo[OBS].get(name), h5py.Dataset)]
    pairs = ((demo[f"{OBS}/{name}"], demo[f"{NEXT_OBS}/{name}"]) for name in names)
    return all(len(now) and len(after) and bool(np.all(now[-1] == after[-1])) for now, after in pairs)


def _read_states(
    demo: h5py.Group, keys: tuple[str, ...], first: int, num_states: int, num_actions: int
) -> Num[np.ndarray, "states dim"]:
    if not _all_have_next(demo, keys):
        return side_by_side([_track(demo, key).read(demo, first, num_states) for key in keys])
    rows = slice(first, first + num_actions)
    states = side_by_side([flat_rows(demo[key][rows]) for key in keys])
    last = side_by_side([flat_rows(demo[_next_key(key)][rows.stop - 1 : rows.stop]) for key in keys])
    return np.concatenate([states, last])


def _given_split(masks: dict[str, set[str]], kept: list[str], mask: str | None, path: str) -> Index | None:
    """Return the split that the masks give each demonstration, or None when no mask is named like a split."""
    prefix = f"{mask}_" if mask else ""
    split = np.full(len(kept), -1, dtype=np.int64)
    found: dict[str, str] = {}
    for name, names in sorted(masks.items()):
        known = SPLIT_OF_MASK.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if known is None:
            continue
        for position, demo in enumerate(kept):
            if demo not in names:
                continue
            if found.setdefault(demo, known) != known:
                raise DataError(
                    f"a demonstration must be in one split: {path}: masks put {demo} in {found[demo]} and {known}"
                )
            split[position] = GIVEN_SPLITS.index(known)
    return split if found else None


def _success(demo: h5py.Group) -> int:
    value = demo.attrs.get("success")
    return -1 if value is None else int(bool(value))


def _same_dims(dims: list[tuple[int, int]], names: list[str], path: str) -> tuple[int, int]:
    for name, found in zip(names, dims, strict=True):
        if found != dims[0]:
            raise DataError(
                f"all episodes must have the same dimensions: {path}: {names[0]} has state, action {dims[0]}, {name} "
                f"has {found}; remove or repair the episode"
            )
    return dims[0]


def _facts(group: h5py.Group) -> dict[str, str | float]:
    """Return the environment's name, which `env_args` keeps as JSON."""
    facts = attributes(group.attrs, ("env_args", "env_name"))
    try:
        stated = json.loads(str(facts.pop("env_args", "{}")))
    except ValueError:
        return facts
    if isinstance(stated, dict) and isinstance(stated.get("env_name"), str):
        facts["env_name"] = stated["env_name"]
    return facts


def _demos_at_root(file: h5py.File, names: list[str], demo_group: str, path: str) -> DataError:
    shapes = array_shapes(file[names[0]])
    state = next((key for key in shapes if re.match(r"obs|state", key)), "KEY")
    action = next((key for key in shapes if re.match(r"act", key)), "KEY")
    return DataError(
        f"demonstrations must be in the group {demo_group!r}: {path}: it has none, but {len(names)} are at the root "
        f"({names[0]} .. {names[-1]}), with {describe_keys(shapes)}; to read them set format: robomimic, "
        f"format_options: {{demo_group: /}}, shape_meta.obs: {{{state}: {{}}}} and shape_meta.action_key: {action}"
    )
