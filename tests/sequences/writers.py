"""Write small recordings of every format, as other projects write them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STATE_DIM, ACTION_DIM = 3, 2


@dataclass
class Episode:
    """One episode: (states, dim), (actions, dim)."""

    states: np.ndarray
    actions: np.ndarray


def make_episodes(lengths: Sequence[int], *, extra_state: bool = True, seed: int = 0) -> list[Episode]:
    """Return random episodes of so many actions, with one state more than actions or as many."""
    random = np.random.default_rng(seed)
    return [
        Episode(
            random.normal(size=(length + extra_state, STATE_DIM)).astype(np.float32),
            random.normal(size=(length, ACTION_DIM)).astype(np.float32),
        )
        for length in lengths
    ]


def stack(episodes: list[Episode]) -> tuple[np.ndarray, np.ndarray]:
    """Return all states and all actions, end to end."""
    states = [episode.states for episode in episodes] or [np.zeros((0, STATE_DIM), np.float32)]
    actions = [episode.actions for episode in episodes] or [np.zeros((0, ACTION_DIM), np.float32)]
    return np.concatenate(states), np.concatenate(actions)


def write_native(folder: Path, episodes: list[Episode]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "shard-00000.hdf5"
    states, actions = stack(episodes)
    with h5py.File(path, "w") as file:
        file["data/state"], file["data/action"] = states, actions
        file["meta/episode_ends"] = np.cumsum([len(e.actions) for e in episodes], dtype=np.int64)
        file["meta/state_ends"] = np.cumsum([len(e.states) for e in episodes], dtype=np.int64)
    return path


def write_robomimic(folder: Path, episodes: list[Episode], *, numbers: Sequence[int] | None = None) -> Path:
    """Write demonstrations without `next_obs`: the states of an episode are as many as its actions."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "low_dim.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(len(e.actions) for e in episodes)
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        for number, episode in zip(numbers or range(len(episodes)), episodes, strict=True):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = len(episode.actions)
            demo["actions"] = episode.actions
            demo["obs/state"] = episode.states[: len(episode.actions)]
    return path


def write_robomimic_next(folder: Path, episodes: list[Episode]) -> Path:
    """Write demonstrations with `next_obs`: one state more than actions."""
    path = write_robomimic(folder, episodes)
    with h5py.File(path, "a") as file:
        for number, episode in enumerate(episodes):
            file[f"data/demo_{number}/next_obs/state"] = episode.states[1:]
    return path


def write_d4rl(folder: Path, episodes: list[Episode]) -> Path:
    """Write flat arrays without next observations: as many states as actions."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "d4rl.hdf5"
    actions = stack(episodes)[1]
    with h5py.File(path, "w") as file:
        file["observations"] = stack([Episode(e.states[: len(e.actions)], e.actions) for e in episodes])[0]
        file["actions"] = actions
        file["rewards"] = np.zeros(len(actions), np.float32)
        file["terminals"] = np.zeros((len(actions), 1), bool)
        file["timeouts"] = _last_rows([len(e.actions) for e in episodes])
    return path


def write_d4rl_next(folder: Path, episodes: list[Episode]) -> Path:
    """Write flat arrays with next observations: one state more than actions."""
    path = write_d4rl(folder, episodes)
    with h5py.File(path, "a") as file:
        file["next_observations"] = stack([Episode(e.states[1:], e.actions) for e in episodes])[0]
    return path


def write_ogbench(folder: Path, episodes: list[Episode], *, compressed: bool = True) -> Path:
    """Write flat arrays in which the last state of an episode has an action that means nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "play-v0.npz"
    states, _ = stack(episodes)
    junk = np.full((1, ACTION_DIM), 99.0, np.float32)
    actions = [np.concatenate([e.actions, junk]) for e in episodes] or [np.zeros((0, ACTION_DIM), np.float32)]
    (np.savez_compressed if compressed else np.savez)(
        path,
        observations=states,
        actions=np.concatenate(actions),
        terminals=_last_rows([len(e.states) for e in episodes]).astype(np.float32),
    )
    return path


def write_ogbench_stored(folder: Path, episodes: list[Episode]) -> Path:
    return write_ogbench(folder, episodes, compressed=False)


def write_minari(folder: Path, episodes: list[Episode]) -> Path:
    path = folder / "data" / "main_data.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            group.attrs["id"] = number
            group["observations"], group["actions"] = episode.states, episode.actions
            group["truncations"] = np.zeros(len(episode.actions), bool)
            group.create_group("infos")
    total = sum(len(e.actions) for e in episodes)
    metadata = {"total_episodes": len(episodes), "total_steps": total, "dataset_id": "test/dataset-v0"}
    (path.parent / "metadata.json").write_text(json.dumps(metadata))
    return folder


def frames_table(
    episodes: list[Episode],
    *,
    first_episode: int = 0,
    first_index: int = 0,
    fixed: bool = True,
    frame_index: bool = True,
) -> pa.Table:
    """Return the rows of some LeRobot episodes."""
    states, actions = stack([Episode(e.states[: len(e.actions)], e.actions) for e in episodes])
    lengths = [len(e.actions) for e in episodes]

    def column(values: np.ndarray) -> pa.Array:
        if fixed:
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        return pa.array(values.astype(np.float64).tolist(), type=pa.list_(pa.float64()))

    columns: dict[str, Any] = {"observation.state": column(states), "action": column(actions)}
    frames = np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in lengths)])
    columns["timestamp"] = frames * 0.05
    if frame_index:
        columns["frame_index"] = frames
    columns["episode_index"] = np.repeat(np.arange(first_episode, first_episode + len(episodes)), lengths)
    columns["index"] = np.arange(first_index, first_index + len(states))
    return pa.table(columns)


def write_info(root: Path, version: str, episodes: list[Episode], **more: Any) -> None:
    (root / "meta").mkdir(parents=True, exist_ok=True)
    info = {
        "codebase_version": version,
        "fps": 20,
        "robot_type": "arm",
        "total_episodes": len(episodes),
        "total_frames": sum(len(e.actions) for e in episodes),
        **more,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))


def write_lerobot_v2(root: Path, episodes: list[Episode], *, fixed: bool = True, frame_index: bool = True) -> Path:
    """Write one Parquet file per episode."""
    write_info(root, "v2.1", episodes)
    folder = root / "data" / "chunk-000"
    folder.mkdir(parents=True, exist_ok=True)
    lines, start = [], 0
    for number, episode in enumerate(episodes):
        table = frames_table([episode], first_episode=number, first_index=start, fixed=fixed, frame_index=frame_index)
        pq.write_table(table, folder / f"episode_{number:06d}.parquet")
        lines.append(json.dumps({"episode_index": number, "length": len(episode.actions)}))
        start += len(episode.actions)
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    return root


def write_lerobot_v20(root: Path, episodes: list[Episode]) -> Path:
    """Write variable lists of double and no frame_index."""
    return write_lerobot_v2(root, episodes, fixed=False, frame_index=False)


def write_lerobot_v3(root: Path, episodes: list[Episode], *, per_file: int = 3, rows_per_group: int = 5) -> Path:
    """Write several episodes per Parquet file, in row groups that cut through episodes."""
    write_info(root, "v3.0", episodes)
    folder = root / "data" / "chunk-000"
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for index, first in enumerate(range(0, len(episodes), per_file)):
        some = episodes[first : first + per_file]
        table = frames_table(some, first_episode=first, first_index=start)
        pq.write_table(table, folder / f"file-{index:03d}.parquet", row_group_size=rows_per_group)
        start += sum(len(e.actions) for e in some)
    write_v3_episodes(root, np.array([len(e.actions) for e in episodes], dtype=np.int64))
    return root


def write_v3_episodes(root: Path, lengths: np.ndarray) -> None:
    folder = root / "meta" / "episodes" / "chunk-000"
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum(lengths)
    table = pa.table(
        {
            "episode_index": np.arange(len(lengths)),
            "dataset_from_index": ends - lengths,
            "dataset_to_index": ends,
            "length": lengths,
        }
    )
    pq.write_table(table, folder / "file-000.parquet")


def write_zarr(path: Path, episodes: list[Episode], *, chunk_rows: int = 7, separator: str = ".") -> Path:
    """Write a replay buffer whose chunks cross episodes."""
    import zarr

    path = path / "buffer.zarr"
    states, actions = stack([Episode(e.states[: len(e.actions)], e.actions) for e in episodes])
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    data, meta = root.create_group("data"), root.create_group("meta")
    for name, values in (("state", states), ("action", actions)):
        names = {"name": "v2", "separator": separator}
        data.create_array(name, data=values, chunks=(chunk_rows, values.shape[1]), chunk_key_encoding=names)
    meta.create_array("episode_ends", data=np.cumsum([len(e.actions) for e in episodes], dtype=np.int64))
    return path


def write_zarr_zip(path: Path, episodes: list[Episode]) -> Path:
    folder = write_zarr(path / "source", episodes)
    target = path / "buffer.zarr.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return target


def write_csv(folder: Path, episodes: list[Episode]) -> Path:
    """Write a file of states and one of actions per episode."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, episode in enumerate(episodes):
        for name, values, columns in (
            ("state", episode.states, "x,y,angle"),
            ("action", episode.actions, "force,torque"),
        ):
            np.savetxt(folder / f"{name}_{number}.csv", values, delimiter=",", header=columns, comments="", fmt="%.9g")
    return folder


def _last_rows(lengths: list[int]) -> np.ndarray:
    flags = np.zeros(sum(lengths), bool)
    ends = np.cumsum(np.array([n for n in lengths if n], dtype=np.int64))
    flags[ends - 1] = True
    return flags


Writer = Callable[[Path, list[Episode]], Path]
