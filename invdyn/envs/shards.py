"""The native files: folders of HDF5 shards, written so that a crash never leaves a wrong file.

A folder that is being filled holds `.collecting.json`, what is being recorded: written first, removed last.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h5py
import mujoco
import numpy as np
from jaxtyping import Float32, Float64, Int64

from invdyn import storage
from invdyn.envs.collect_config import CollectConfig
from invdyn.errors import ConfigError, DataError
from invdyn.url_path import AnyPath, as_path, write_whole

FORMAT, VERSION = "invdyn-sequences", 1
MARKER_NAME = ".collecting.json"
STATE_KEY, ACTION_KEY = "data/state", "data/action"
EPISODE_ENDS_KEY, STATE_ENDS_KEY = "meta/episode_ends", "meta/state_ends"
_SHARD_PATTERN, _TEMPORARY_PATTERN = "shard-[0-9][0-9][0-9][0-9][0-9].hdf5", ".shard-*.hdf5.*.tmp"
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class Shard:
    """The episodes of one file, one after another.

    Attributes:
        state: one more than actions in every episode (states, state_dim).
        action: (steps, action_dim).
        episode_ends: rows of `action` before the end of each episode (episodes,).
        state_ends: rows of `state` before the end of each episode (episodes,).
    """

    state: Float64[np.ndarray, "states state_dim"]
    action: Float32[np.ndarray, "steps action_dim"]
    episode_ends: Int64[np.ndarray, " episodes"]
    state_ends: Int64[np.ndarray, " episodes"]

    @classmethod
    def of(cls, states: Sequence[np.ndarray], actions: Sequence[np.ndarray]) -> Self:
        """Join episodes."""
        return cls(
            np.concatenate(states),
            np.concatenate(actions),
            np.cumsum([len(action) for action in actions], dtype=np.int64),
            np.cumsum([len(state) for state in states], dtype=np.int64),
        )


def shard_path(folder: str | AnyPath, shard_index: int) -> AnyPath:
    """Return the name of a shard's file."""
    return as_path(folder) / f"shard-{shard_index:05d}.hdf5"


def list_shards(folder: str | AnyPath) -> list[AnyPath]:
    """Return the shard files in a folder, in order."""
    names = storage.list_names(str(folder))
    return [as_path(folder) / name for name in sorted(fnmatch.filter(names, _SHARD_PATTERN))]


def write_shard(path: AnyPath, shard: Shard, config: CollectConfig, dt_s: float) -> None:
    """Write a shard under a temporary name, flush it to the disk, and rename it.

    Raises:
        DataError: when the disk is full or the folder cannot be written; no file is left behind.
    """
    env_id, env_kwargs = config.task
    attributes = {
        "format": FORMAT,
        "version": VERSION,
        "env_id": env_id,
        "env_kwargs": _to_json(env_kwargs),
        "dt_s": dt_s,
        "seed": config.seed,
        "collect": _to_json(config.model_dump(mode="json")),
        "mujoco_version": mujoco.__version__,
    }
    write_atomically(path, encode_shard(shard, attributes))


def encode_shard(shard: Shard, attributes: dict[str, Any]) -> bytes:
    """Return the bytes of a shard's file: the same values give the same bytes."""
    # In memory first: an HDF5 file whose disk fills up while it is open cannot be closed cleanly.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        for key, values in (
            (STATE_KEY, shard.state),
            (ACTION_KEY, shard.action),
            (EPISODE_ENDS_KEY, shard.episode_ends),
            (STATE_ENDS_KEY, shard.state_ends),
        ):
            file.create_dataset(key, data=values, track_times=False)
        for name, value in attributes.items():
            file.attrs[name] = value
    return buffer.getvalue()


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Write a file so that its name never stands for half of it.

    Raises:
        DataError: when it cannot be written; no file is left behind.
        StorageError: when a storage service does not take it.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise _write_error(path, error, len(content)) from None


def open_folder(folder: str | AnyPath, config: CollectConfig, overwrite: bool = False) -> list[int]:
    """Prepare a folder for recording, and return the shards that are still to be recorded.

    An unfinished folder of the same config is continued. `overwrite` removes shards and the marker, nothing else.

    Raises:
        ConfigError: when the folder holds something else that `overwrite` would have to remove.
        DataError: when the folder cannot be written.
        StorageError: when a storage service does not take what is written.
    """
    folder = as_path(folder)
    wanted = _marker_text(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(folder, error, 0) from None
    marker = folder / MARKER_NAME
    found = _read_text(marker)
    if overwrite:
        _remove_shards(folder, marker)
    elif found is None and list_shards(folder):
        raise ConfigError(
            f"buffer_path must not hold a recording yet, found {len(list_shards(folder))} finished shards in {folder}; "
            "give --overwrite to record anew"
        )
    elif found is not None and found != wanted:
        raise ConfigError(
            f"the unfinished recording in {folder} is of another config ({_difference(found, wanted)}); continue with "
            "that config, or give --overwrite to record anew"
        )
    for leftover in folder.glob(_TEMPORARY_PATTERN) if isinstance(folder, Path) else ():
        leftover.unlink(missing_ok=True)
    write_atomically(marker, wanted.encode())
    return _missing_shards(folder, config)


def close_folder(folder: str | AnyPath, config: CollectConfig) -> None:
    """Declare a recording finished.

    Raises:
        DataError: when a shard is missing: workers then write to another disk than this process reads.
    """
    folder = as_path(folder)
    if missing := _missing_shards(folder, config):
        raise DataError(
            f"{folder} must hold {config.num_shards} shards, {len(missing)} are not there (first: "
            f"{shard_path(folder, missing[0]).name}); on a cluster, buffer_path must be a URL or a "
            "folder that all nodes share"
        )
    (folder / MARKER_NAME).unlink(missing_ok=True)


def _missing_shards(folder: AnyPath, config: CollectConfig) -> list[int]:
    found = {path.name for path in list_shards(folder)}
    return [index for index in range(config.num_shards) if shard_path(folder, index).name not in found]


def _remove_shards(folder: AnyPath, marker: AnyPath) -> None:
    # A marker of no config comes first: killed half-way, the rest is neither a finished recording nor one to continue.
    write_atomically(marker, _to_json({"overwriting": True}).encode())
    for path in list_shards(folder):
        path.unlink(missing_ok=True)


def _marker_text(config: CollectConfig) -> str:
    # Another version of MuJoCo may round differently: the parts of a recording must come from one.
    return _to_json({"collect": config.model_dump(mode="json"), "mujoco_version": mujoco.__version__})


def _difference(found: str, wanted: str) -> str:
    """Name the first value in which two markers differ."""
    try:
        old, new = json.loads(found), json.loads(wanted)
    except json.JSONDecodeError:
        return "its marker cannot be read"
    if "overwriting" in old:
        return "an overwrite was interrupted"
    for name in (*new["collect"], "mujoco_version"):
        before = old.get("collect", {}).get(name, old.get(name))
        after = new["collect"].get(name, new.get(name))
        if before != after:
            return f"{name} was {before}, now {after}"
    return "its marker cannot be read"


def _read_text(path: AnyPath) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _write_error(path: AnyPath, error: OSError, num_bytes: int) -> DataError:
    if error.errno in _DISK_FULL:
        return DataError(
            f"disk full while writing {path} ({num_bytes / 1e6:.1f} MB); finished shards are kept: free space and run "
            "the same command again"
        )
    return DataError(f"{path} cannot be written: {error.strerror or error}; check buffer_path and its permissions")


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
