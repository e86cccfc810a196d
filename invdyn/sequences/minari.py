"""Minari: one HDF5 group per episode, `episode_<i>`, with one observation more than actions.

Every step is a transition. Dict spaces are groups of arrays, Tuple spaces groups of `_index_0`, `_index_1`, ...; their
keys are paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from invdyn import storage
from invdyn.errors import DataError
from invdyn.sequences import files
from invdyn.sequences.base import EpisodeArrays, SequencePlan
from invdyn.sequences.file_reader import FileReader, changed, plan_file
from invdyn.sequences.files import find_files, open_hdf5, read_json, source_file
from invdyn.sequences.hdf5 import (
    array_shapes,
    attributes,
    describe_keys,
    first_readable,
    flat_rows,
    numbered_groups,
    numeric_array,
    only_key,
    side_by_side,
    width,
)

MAIN_DATA = "main_data.hdf5"
METADATA = "metadata.json"
OBSERVATIONS = "observations"
EPISODE_NAME = re.compile(r"episode_(\d+)")
FACTS = ("dataset_id", "minari_version", "total_episodes", "total_steps")


class MinariReader(FileReader):
    """Reads a Minari dataset: its folder, its `data` folder or the file itself.

    Args:
        path: folder or file.
        state_keys: paths within `observations` (or within the episode, such as `infos/qpos`); may be left out when the
            observation is a single vector.
        action_key: path of the actions within the episode.
        on_error: `fail` or `skip`.
    """

    format_name = "minari"

    @classmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether there is a main_data.hdf5, or the first file has episodes."""
        if _main_files(str(path)):
            return True
        first = first_readable(str(path))
        if first is None:
            return False
        with open_hdf5(first) as file:
            return any(EPISODE_NAME.fullmatch(name) for name in file)

    def find(self) -> list[str]:
        """Return the dataset's file."""
        found = _main_files(self.path) or find_files(self.path, files.HDF5_SUFFIXES)
        mains = [path for path in found if path.endswith(MAIN_DATA)]
        if len(mains) > 1:
            raise DataError(
                f"buffer_path must name one Minari dataset: {self.path} holds {len(mains)}: "
                f"{', '.join(storage.parent(storage.parent(path)) for path in mains[:10])}"
            )
        return found

    def inspect_file(self, path: str) -> SequencePlan:
        """Measure every episode."""
        with open_hdf5(path) as file:
            episodes = numbered_groups(file, EPISODE_NAME, path)
            names = list(episodes.values())
            if not names:
                raise DataError(
                    f"a recording must hold at least one episode: {path} has no episode_<number>; found "
                    f"{describe_keys(array_shapes(file))}; check format"
                )
            measured = [self._inspect_episode(file, name, path) for name in names]
            dims = {(state_dim, action_dim) for _, _, state_dim, action_dim in measured}
            if len(dims) > 1:
                other = next(i for i, m in enumerate(measured) if m[2:] != measured[0][2:])
                raise DataError(
                    f"all episodes must have the same dimensions: {path}: {names[0]} has state, action "
                    f"{measured[0][2:]}, {names[other]} has {measured[other][2:]}; remove or repair the episode"
                )
            lengths = np.array(measured, dtype=np.int64)
            facts = _facts(path, file.attrs)
            return plan_file(
                source_file(path, self.path),
                num_states=lengths[:, 0],
                num_actions=lengths[:, 1],
                dims=dims.pop(),
                episode_index=np.array(list(episodes)),
                warnings=_differences(path, facts, len(names), int(lengths[:, 1].sum())),
                attributes={name: value for name, value in facts.items() if not name.startswith("total_")},
            )

    def read(self, plan: SequencePlan) -> EpisodeArrays:
        """Read each array of each episode at once."""
        source = plan.files[plan.file_index[0]]
        path = source.path
        states, actions = [], []
        with open_hdf5(path) as file:
            names = self.keep(source, lambda: numbered_groups(file, EPISODE_NAME, path))
            columns = (plan.episode_index, plan.num_states, plan.num_actions)
            for number, num_states, num_actions in zip(*(column.tolist() for column in columns), strict=True):
                episode = file.get(names[number]) if number in names else None
                if episode is None:
                    raise changed(path)
                keys = self._keys(episode, f"{path}: {names[number]}")
                states.append(side_by_side([flat_rows(episode[key][()]) for key in keys]))
                actions.append(flat_rows(episode[self.action_key][()]))
                if (len(states[-1]), len(actions[-1])) != (num_states, num_actions):
                    raise changed(path)
        return EpisodeArrays(np.concatenate(states), np.concatenate(actions))

    def _keys(self, episode: h5py.Group, where: str) -> tuple[str, ...]:
        """Return the paths of the state keys within an episode."""
        observations = episode.get(OBSERVATIONS)
        if self.state_keys:
            inside = observations if isinstance(observations, h5py.Group) else ()
            return tuple(f"{OBSERVATIONS}/{key}" if key in inside else key for key in self.state_keys)
        if isinstance(observations, h5py.Dataset):
            return (OBSERVATIONS,)
        only = only_key(observations)
        if only is not None:
            return (f"{OBSERVATIONS}/{only}",)
        raise DataError(
            f"shape_meta.obs must name the keys of the state: {where}: there is no single choice; found "
            f"{describe_keys(array_shapes(episode))}"
        )

    def _inspect_episode(self, file: h5py.File, name: str, path: str) -> tuple[int, int, int, int]:
        """Return states, actions, state_dim and action_dim of an episode."""
        where = f"{path}: {name}"
        episode = file.get(name)
        if not isinstance(episode, h5py.Group):
            raise DataError(f"episode must be a group: {where}: it is missing or links to a file that is not there")
        keys = self._keys(episode, where)
        states = {key: numeric_array(episode, key, where) for key in keys}
        actions = numeric_array(episode, self.action_key, where)
        wrong = {key: len(array) for key, array in states.items() if len(array) != len(actions) + 1}
        if wrong:
            key, size = next(iter(wrong.items()))
            raise DataError(
                f"lengths disagree: {where}: {key} has {size} rows, {self.action_key} {len(actions)}; an episode of T "
                "actions must have T + 1 observations"
            )
        return (
            len(actions) + 1,
            len(actions),
            sum(width(array.shape) for array in states.values()),
            width(actions.shape),
        )


def _main_files(path: str) -> list[str]:
    """Return the main data files at a path, in its `data` folder, or anywhere below it."""
    if not storage.is_folder(path):
        return [path] if path.endswith(MAIN_DATA) and storage.exists(path) else []
    for candidate in (storage.join(path, MAIN_DATA), storage.join(path, "data", MAIN_DATA)):
        if storage.exists(candidate):
            return [candidate]
    return find_files(path, (MAIN_DATA,), recursive=True)


def _facts(path: str, attrs: Mapping[str, object]) -> dict[str, str | float]:
    """Return what the metadata says; older files keep it in the root's attributes."""
    stated: dict[str, object] = dict(attrs)
    metadata = storage.join(storage.parent(path), METADATA)
    if storage.exists(metadata):
        stated |= read_json(metadata)
    facts = attributes(stated, FACTS)
    try:
        spec = json.loads(str(stated.get("env_spec") or "{}"))
    except ValueError:
        return facts
    if isinstance(spec, dict) and isinstance(spec.get("id"), str):
        facts["env_name"] = spec["id"]
    return facts


def _differences(path: str, facts: Mapping[str, str | float], num_episodes: int, num_steps: int) -> list[str]:
    return [
        f"{path}: the metadata says {key} {facts[key]:g}, the file has {found}; the file is used"
        for key, found in (("total_episodes", num_episodes), ("total_steps", num_steps))
        if isinstance(facts.get(key), float | int) and facts[key] != found
    ]
