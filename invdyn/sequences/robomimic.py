"""robomimic: one HDF5 group per demonstration, `data/demo_<i>`; `mask/<name>` lists the demonstrations of a split."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np

from invdyn.errors import DataError
from invdyn.sequences.base import GIVEN_SPLITS, SPLIT_NAMES, EpisodeArrays, Index, SequencePlan
from invdyn.sequences.demonstrations import OBS, measure, read_states
from invdyn.sequences.file_reader import FAIL, FileReader, changed, plan_file
from invdyn.sequences.files import open_hdf5, source_file
from invdyn.sequences.hdf5 import (
    array_shapes,
    attributes,
    describe_keys,
    find_hdf5,
    first_readable,
    flat_rows,
    numbered_groups,
    only_key,
)

DATA_GROUP = "data"
MASK_GROUP = "mask"
DEMO_NAME = re.compile(r"demo_(\d+)")
PREVIOUS_ACTION_KEYS = ("actions", "action", "last_action", "prev_actions")

NOT_IN_MASK = "not_in_mask"


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
            return empty or any(DEMO_NAME.fullmatch(name) for group in groups for name in group)

    def find(self) -> list[str]:
        """Return the HDF5 files."""
        return find_hdf5(self.path)

    def inspect_file(self, path: str) -> SequencePlan:
        """Measure every demonstration; where next observations are recorded, compare them with the observations."""
        with open_hdf5(path) as file:
            group, demos = self._demos(file, path)
            names = list(demos.values())
            kept, masks = self._in_mask(file, names, path)
            keys = self._keys(group[kept[0]], f"{path}: {kept[0]}")
            pieces = [measure(group[name], keys, self.action_key, f"{path}: {name}") for name in kept]
            split, warnings = _given_split(masks, kept, self.mask, path)
            left_out = set(names) - set(kept)
            drops = Counter({NOT_IN_MASK: sum(_num_rows(group[name], self.action_key) for name in left_out)})
            for piece in pieces:
                drops.update(piece.drops)
            counts = np.array([len(piece.first_row) for piece in pieces])
            success = np.array([piece.success for piece in pieces])
            return plan_file(
                source_file(path, self.path),
                num_states=np.concatenate([piece.num_states for piece in pieces]),
                num_actions=np.concatenate([piece.num_actions for piece in pieces]),
                dims=_same_dims([piece.dims for piece in pieces], kept, path),
                episode_index=np.repeat([number for number, name in demos.items() if name not in left_out], counts),
                first_row=np.concatenate([piece.first_row for piece in pieces]),
                given_split=None if split is None else np.repeat(split, counts),
                success=np.repeat(success, counts) if (success >= 0).any() else None,
                drops=dict(drops),
                warnings=[*(line for piece in pieces for line in piece.warnings), *warnings, *self._leaks(path)],
                attributes=_facts(group),
            )

    def read(self, plan: SequencePlan) -> EpisodeArrays:
        """Read one slice per array and piece of a demonstration."""
        source = plan.files[plan.file_index[0]]
        path = source.path
        assert plan.first_row is not None
        states, actions = [], []
        keys: tuple[str, ...] = ()
        with open_hdf5(path) as file:
            names = self.keep(source, lambda: self._demos(file, path)[1])
            group = file[self.demo_group]
            columns = (plan.episode_index, plan.first_row, plan.num_states, plan.num_actions)
            for number, first, num_states, num_actions in zip(*(c.tolist() for c in columns), strict=True):
                demo = group.get(names[number]) if number in names else None
                if demo is None:
                    raise changed(path)
                keys = keys or self._keys(demo, f"{path}: {names[number]}")
                states.append(read_states(demo, keys, first, num_states, num_actions))
                actions.append(flat_rows(demo[self.action_key][first : first + num_actions]))
                if (len(states[-1]), len(actions[-1])) != (num_states, num_actions):
                    raise changed(path)
        return EpisodeArrays(np.concatenate(states), np.concatenate(actions))

    def _demos(self, file: h5py.File, path: str) -> tuple[h5py.Group, dict[int, str]]:
        """Return the group of the demonstrations and their names by their numbers, in order."""
        group = file.get(self.demo_group)
        demos = numbered_groups(group, DEMO_NAME, path) if isinstance(group, h5py.Group) else {}
        if demos:
            return group, demos
        at_root = numbered_groups(file, DEMO_NAME, path)
        if at_root:
            raise _demos_at_root(file, list(at_root.values()), self.demo_group, path)
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

    def _in_mask(self, file: h5py.File, demos: list[str], path: str) -> tuple[list[str], dict[str, set[str]]]:
        """Return the demonstrations to read, and the names in each mask."""
        group = file.get(MASK_GROUP)
        masks = {
            name: {value.decode() if isinstance(value, bytes) else str(value) for value in group[name][()].reshape(-1)}
            for name in (group or ())
            if isinstance(group[name], h5py.Dataset)
        }
        if self.mask is None:
            return demos, masks
        if self.mask not in masks:
            raise DataError(f"mask {self.mask!r} is missing: {path}: found {', '.join(sorted(masks)) or 'no masks'}")
        kept = [name for name in demos if name in masks[self.mask]]
        if not kept:
            raise DataError(f"mask {self.mask!r} must name a demonstration of the file: {path}: it names none")
        return kept, masks

    def _keys(self, demo: h5py.Group, where: str) -> tuple[str, ...]:
        """Return the paths of the state keys within a demonstration."""
        obs = demo.get(OBS)
        if self.state_keys:
            in_obs = obs if isinstance(obs, h5py.Group) else ()
            return tuple(f"{OBS}/{key}" if key in in_obs else key for key in self.state_keys)
        only = only_key(obs)
        if only is not None:
            return (f"{OBS}/{only}",)
        raise DataError(
            f"shape_meta.obs must name the keys of the state: {where}: there is no single choice; found "
            f"{describe_keys(array_shapes(demo))}"
        )

    def _leaks(self, path: str) -> list[str]:
        leaks = [key for key in self.state_keys if key.rpartition("/")[2] in PREVIOUS_ACTION_KEYS]
        return [
            f"{path}: state key {key} holds the previous action by its name, so the next state holds the action to "
            "predict; leave it out of shape_meta.obs"
            for key in leaks
        ]


def _num_rows(demo: h5py.Group, key: str) -> int:
    array = demo.get(key)
    return int(array.shape[0]) if isinstance(array, h5py.Dataset) and array.shape else 0


def _given_split(
    masks: dict[str, set[str]], kept: list[str], mask: str | None, path: str
) -> tuple[Index | None, list[str]]:
    """Return the split that the masks give each demonstration (None without such masks), and what is wrong."""
    prefix = f"{mask}_" if mask else ""
    member = np.zeros((len(GIVEN_SPLITS), len(kept)), dtype=bool)
    for name, names in masks.items():
        known = SPLIT_NAMES.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if known is not None:
            member[GIVEN_SPLITS.index(known)] |= np.array([demo in names for demo in kept])
    if not member.any():
        return None, []
    split = np.where(member.sum(axis=0) == 1, member.argmax(axis=0), -1)
    twice = np.flatnonzero(member.sum(axis=0) > 1)
    if not len(twice):
        return split, []
    return split, [f"{path}: masks put {kept[twice[0]]} and {len(twice) - 1} more in several splits; they are in none"]


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
