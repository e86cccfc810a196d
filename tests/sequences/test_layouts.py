"""Small imitations of whole recordings as their projects publish them, with all that lies beside states and actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from invdyn.errors import DataError
from invdyn.sequences.registry import open_sequences
from tests.sequences.reading import transitions_of
from tests.sequences.writers import write_v3_episodes

RANDOM = np.random.default_rng(0)


def floats(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(dtype)


def write(path: Path, arrays: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


# D4RL


def mujoco(path: Path, *, version: int) -> Path:
    """hopper, halfcheetah, walker2d: policy weights in `metadata`, simulator state in `infos`."""
    states = floats(53, 11)
    ends = np.zeros(50, bool)
    ends[[19, 34]] = True
    arrays = {
        "observations": states[:50],
        "actions": floats(50, 3),
        "rewards": floats(50),
        "terminals": ends & (np.arange(50) == 34),
        "timeouts": ends & (np.arange(50) == 19),
        "infos/action_log_probs": floats(50),
        "infos/qpos": floats(50, 6, dtype=np.float64),
        "infos/qvel": floats(50, 6, dtype=np.float64),
        "metadata/algorithm": np.bytes_(b"SAC"),
        "metadata/iteration": np.int64(3000),
        "metadata/policy/fc0/weight": floats(256, 11),
        "metadata/policy/fc0/bias": floats(256),
    }
    if version == 2:
        after = states[1:51].copy()
        after[ends] = floats(2, 11)
        arrays["next_observations"] = after
    return write(path, arrays)


@pytest.mark.parametrize(("version", "rows"), [(0, 47), (2, 50)])
def test_d4rl_mujoco(tmp_path: Path, version: int, rows: int) -> None:
    path = mujoco(tmp_path / f"hopper_medium-v{version}.hdf5", version=version)
    plan, found = transitions_of(path)
    assert plan.num_actions.tolist() == [20, 15, 15]
    assert len(found) == rows
    assert plan.warnings == ()
    plan, found = transitions_of(path, state_keys=["infos/qpos", "infos/qvel"])
    assert plan.state_dim == 12
    assert len(found) == 47


def test_d4rl_antmaze(tmp_path: Path) -> None:
    """`terminals` mark the goal, `timeouts` the resets; both are (N,) here and (N, 1) elsewhere."""
    timeouts = np.zeros((40, 1), bool)
    timeouts[[19, 39]] = True
    path = write(
        tmp_path / "antmaze.hdf5",
        {
            "observations": floats(40, 29),
            "actions": floats(40, 8),
            "rewards": np.zeros(40, np.float32),
            "terminals": np.zeros(40, bool),
            "timeouts": timeouts,
            "infos/goal": floats(40, 2),
            "infos/qpos": floats(40, 15),
            "infos/qvel": floats(40, 14),
        },
    )
    plan, rows = transitions_of(path)
    assert plan.num_states.tolist() == [20, 20]
    assert len(rows) == 38


def test_d4rl_adroit_and_kitchen(tmp_path: Path) -> None:
    """adroit: strings in `infos` and `metadata`; kitchen: no `timeouts`, and no flag is ever set."""
    adroit = write(
        tmp_path / "pen" / "pen-human.hdf5",
        {
            "observations": floats(30, 45, dtype=np.float64),
            "actions": floats(30, 24, dtype=np.float64),
            "rewards": floats(30),
            "terminals": np.arange(30) == 29,
            "timeouts": np.arange(30) == 14,
            "infos/desired_orien": floats(30, 4),
            "infos/env_infos/note": np.array([b"x"] * 30),
            "metadata/env": np.bytes_(b"pen-v0"),
        },
    )
    assert len(transitions_of(adroit)[1]) == 28
    kitchen = write(
        tmp_path / "kitchen" / "kitchen.hdf5",
        {
            "observations": floats(30, 60),
            "actions": floats(30, 9),
            "rewards": floats(30),
            "terminals": np.zeros(30, np.uint8),
        },
    )
    plan, rows = transitions_of(kitchen)
    assert plan.num_states.tolist() == [30]
    assert len(rows) == 29


# OGBench


def test_ogbench_cube(tmp_path: Path) -> None:
    terminals = np.zeros(42, np.float32)
    terminals[[20, 41]] = 1
    arrays = {
        "observations": floats(42, 28),
        "actions": floats(42, 5),
        "terminals": terminals,
        "qpos": floats(42, 21),
        "qvel": floats(42, 20),
        "button_states": np.zeros((42, 2), np.int64),
    }
    for name in ("cube-single-play-v0", "cube-single-play-v0-val"):
        np.savez_compressed(tmp_path / f"{name}.npz", **arrays)
    path = tmp_path / "cube-single-play-v0.npz"
    plan, rows = transitions_of(path)
    assert plan.num_states.tolist() == [21] * 4
    assert plan.num_actions.tolist() == [20] * 4
    assert plan.given_split is not None
    assert plan.given_split.tolist() == [0, 0, 1, 1]
    assert len(rows) == 80
    assert transitions_of(path, state_keys=["qpos", "qvel", "button_states"])[0].state_dim == 43


# Minari


def minari_episode(arrays: dict[str, Any], number: int, steps: int, *, dict_space: bool) -> None:
    group = f"episode_{number}"
    if dict_space:
        arrays[f"{group}/observations/observation"] = floats(steps + 1, 59, dtype=np.float64)
        for goal in ("microwave", "kettle", "light switch"):
            arrays[f"{group}/observations/achieved_goal/{goal}"] = floats(steps + 1, 1, dtype=np.float64)
            arrays[f"{group}/observations/desired_goal/{goal}"] = floats(steps + 1, 1, dtype=np.float64)
        arrays[f"{group}/infos/step_task_completions"] = np.array([b""] * (steps + 1))
    else:
        arrays[f"{group}/observations"] = floats(steps + 1, 39, dtype=np.float64)
        arrays[f"{group}/infos/success"] = np.zeros(steps + 1, bool)
        arrays[f"{group}/infos/state/qpos"] = floats(steps + 1, 30)
    arrays[f"{group}/actions"] = floats(steps, 9)
    arrays[f"{group}/rewards"] = floats(steps)
    arrays[f"{group}/terminations"] = np.zeros(steps, bool)
    arrays[f"{group}/truncations"] = np.arange(steps) == steps - 1


@pytest.mark.parametrize("dict_space", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_minari_d4rl(tmp_path: Path, dict_space: bool, old: bool) -> None:
    arrays: dict[str, Any] = {}
    for number in range(12):
        minari_episode(arrays, number, 5 + number, dict_space=dict_space)
    path = write(tmp_path / "D4RL/door/human-v2/data/main_data.hdf5", arrays)
    facts = {
        "dataset_id": "D4RL/door/human-v2",
        "total_episodes": 12,
        "total_steps": sum(range(5, 17)),
        "env_spec": json.dumps({"id": "AdroitHandDoor-v1", "kwargs": {}}),
        "minari_version": "0.5.0",
        "author": ["a", "b"],
        "observation_space": json.dumps({"type": "Box"}),
    }
    with h5py.File(path, "a") as file:
        for number in range(12):
            file[f"episode_{number}"].attrs.update({"id": number, "seed": np.uint64(2**63), "total_steps": 5 + number})
        if old:
            file.attrs.update({name: value for name, value in facts.items() if name != "author"})
    if not old:
        (path.parent / "metadata.json").write_text(json.dumps(facts))
    if dict_space:
        with pytest.raises(DataError, match=r"shape_meta\.obs must name .*achieved_goal/kettle \(6, 1\)"):
            transitions_of(tmp_path)
    keys = ["observation", "achieved_goal/kettle"] if dict_space else None
    plan, rows = transitions_of(tmp_path / "D4RL/door/human-v2", state_keys=keys)
    assert plan.num_actions.tolist() == list(range(5, 17))
    assert plan.state_dim == (60 if dict_space else 39)
    assert len(rows) == sum(range(5, 17))
    assert plan.attributes["env_name"] == "AdroitHandDoor-v1"
    assert plan.warnings == ()
    if not dict_space:
        assert transitions_of(tmp_path, state_keys=["infos/state/qpos"])[0].state_dim == 30


# LeRobot


def lerobot_table(number: int, start: int, rows: int) -> pa.Table:
    """Rows of an episode with an image column before the state, flags and scalars."""
    vector = pa.list_(pa.float32(), 6)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table(
        {
            "observation.image": pa.array([{"bytes": b"x", "path": "p"}] * rows, type=image),
            "observation.state": pa.array(list(floats(rows, 6)), type=vector),
            "action": pa.array(list(floats(rows, 6)), type=vector),
            "next.reward": floats(rows),
            "next.done": np.arange(rows) == rows - 1,
            "timestamp": np.arange(rows, dtype=np.float32) / 30,
            "frame_index": np.arange(rows),
            "episode_index": np.full(rows, number),
            "index": np.arange(start, start + rows),
            "task_index": np.zeros(rows, np.int64),
        }
    )


FEATURES = {
    "observation.images.top": {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]},
    "observation.image": {"dtype": "image", "shape": [4, 4, 3], "names": None},
    "observation.state": {"dtype": "float32", "shape": [6], "names": {"motors": [["main_waist", "main_shoulder"]]}},
    "action": {"dtype": "float32", "shape": [6], "names": {"motors": ["main_waist"]}},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
    **{n: {"dtype": "int64", "shape": [1], "names": None} for n in ("frame_index", "episode_index", "index")},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


def lerobot_info(root: Path, version: str, lengths: list[int]) -> None:
    info = {
        "codebase_version": version,
        "robot_type": None,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 1,
        "total_videos": len(lengths),
        "total_chunks": 2,
        "chunks_size": 2,
        "fps": 30,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "features": FEATURES,
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "Pick"}))
    (root / "meta/stats.json").write_text("{}")


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_lerobot_hub_dataset(tmp_path: Path, version: str) -> None:
    lengths = [5, 7, 4, 9]
    lerobot_info(tmp_path, version, lengths)
    starts = np.cumsum(lengths) - lengths
    tables = [lerobot_table(i, int(start), n) for i, (start, n) in enumerate(zip(starts, lengths, strict=True))]
    if version == "v3.0":
        files = {"chunk-000/file-000": tables[:2], "chunk-000/file-001": tables[2:3], "chunk-001/file-000": tables[3:]}
        write_v3_episodes(tmp_path, np.array(lengths))
        meta = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
        listed = pq.read_table(meta).append_column("tasks", pa.array([["Pick"]] * 4))
        pq.write_table(listed.append_column("stats/action/mean", pa.array([[0.0] * 6] * 4)), meta)
        pq.write_table(pa.table({"task_index": [0]}), tmp_path / "meta/tasks.parquet")
    else:
        files = {f"chunk-{i // 2:03d}/episode_{i:06d}": [table] for i, table in enumerate(tables)}
        lines = [{"episode_index": i, "tasks": ["Pick"], "length": n} for i, n in enumerate(lengths)]
        (tmp_path / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / "meta/episodes_stats.jsonl").write_text("{}\n")
    for name, some in files.items():
        path = tmp_path / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(some), path, row_group_size=4)
    (tmp_path / "videos/chunk-000/observation.images.top").mkdir(parents=True)
    plan, rows = transitions_of(tmp_path)
    assert plan.num_states.tolist() == lengths
    assert (plan.state_dim, plan.action_dim) == (6, 6)
    assert len(rows) == sum(lengths) - 4
    assert plan.warnings == ()
    expected = np.stack(tables[1].column("observation.state").to_numpy())
    np.testing.assert_array_equal(rows.state[4:10], expected[:-1])
    assert transitions_of(tmp_path, state_keys=["observation.state", "next.done"])[0].state_dim == 7


# diffusion_policy


@pytest.mark.parametrize("compressor", ["blosc", "zstd", "gzip", "zlib", "lz4", "none"])
def test_replay_buffer_with_any_compressor(tmp_path: Path, compressor: str) -> None:
    """Push-T: images beside the vectors, attributes, consolidated metadata; damage is found whatever compresses."""
    zarr = pytest.importorskip("zarr")
    codecs = pytest.importorskip("numcodecs")
    made = {
        "blosc": lambda: codecs.Blosc("zstd", clevel=5, shuffle=2),
        "zstd": codecs.Zstd,
        "gzip": codecs.GZip,
        "zlib": codecs.Zlib,
        "lz4": codecs.LZ4,
        "none": lambda: None,
    }[compressor]()
    path = tmp_path / "pusht_cchi_v7_replay.zarr"
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root.attrs["origin"] = "imitation"
    data, meta = root.create_group("data"), root.create_group("meta")
    states, actions = floats(24, 5), floats(24, 2)
    arrays = {
        "state": states,
        "action": actions,
        "img": RANDOM.integers(0, 255, (24, 8, 8, 3)).astype(np.uint8),
        "keypoint": floats(24, 9, 2),
        "n_contacts": floats(24, 1),
    }
    for name, values in arrays.items():
        data.create_array(name, data=values, chunks=(10, *values.shape[1:]), compressors=made)
    meta.create_array("episode_ends", data=np.array([9, 24], np.int64), compressors=made)
    zarr.consolidate_metadata(str(path), zarr_format=2)
    plan, rows = transitions_of(path)
    assert plan.num_states.tolist() == [9, 15]
    assert len(rows) == 22
    np.testing.assert_array_equal(rows.action[:8], actions[:8])
    assert transitions_of(path, state_keys=["state", "keypoint"])[0].state_dim == 23
    with pytest.raises(DataError, match=r"'data/agent_pos' is missing.*data/img \(24, 8, 8, 3\)"):
        transitions_of(path, state_keys=["agent_pos"])
    chunk = path / "data/state/1.0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(DataError, match=r"truncated, corrupt or .*pusht_cchi_v7_replay\.zarr"):
        transitions_of(path)


def test_replay_buffer_with_images_that_nothing_here_can_decode(tmp_path: Path) -> None:
    """The images of some replay buffers need a codec of their own; the vectors beside them do not."""
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "umi.zarr"
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    data, meta = root.create_group("data"), root.create_group("meta")
    data.create_array("robot0_eef_pos", data=floats(12, 3))
    data.create_array("action", data=floats(12, 7))
    data.create_array("camera0_rgb", data=np.zeros((12, 4, 4, 3), np.uint8))
    meta.create_array("episode_ends", data=np.array([12], np.int64))
    description = path / "data/camera0_rgb/.zarray"
    values = json.loads(description.read_text())
    description.write_text(json.dumps({**values, "compressor": {"id": "imagecodecs_jpegxl", "level": 99}}))
    assert len(transitions_of(path, state_keys=["robot0_eef_pos"])[1]) == 11
    with pytest.raises(DataError, match=r"'data/state' is missing.*data/robot0_eef_pos \(12, 3\)"):
        transitions_of(path)


# robomimic


def demo(arrays: dict[str, Any], number: int, steps: int, *, with_next: bool) -> None:
    group = f"data/demo_{number}"
    obs = {key: floats(steps + 1, dim, dtype=np.float64) for key, dim in (("object", 10), ("robot0_eef_pos", 3))}
    for key, values in obs.items():
        arrays[f"{group}/obs/{key}"] = values[:-1]
        if with_next:
            arrays[f"{group}/next_obs/{key}"] = values[1:]
    arrays[f"{group}/obs/agentview_image"] = np.zeros((steps, 4, 4, 3), np.uint8)
    arrays[f"{group}/actions"] = floats(steps, 7, dtype=np.float64)
    arrays[f"{group}/actions_abs"] = floats(steps, 7, dtype=np.float64)
    arrays[f"{group}/action_dict/rel_pos"] = floats(steps, 3)
    arrays[f"{group}/states"] = floats(steps, 32, dtype=np.float64)
    arrays[f"{group}/rewards"] = np.zeros(steps)
    arrays[f"{group}/dones"] = (np.arange(steps) == steps - 1).astype(np.int64)


@pytest.mark.parametrize("with_next", [False, True])
def test_robomimic_low_dim(tmp_path: Path, with_next: bool) -> None:
    arrays: dict[str, Any] = {}
    for number in range(12):
        demo(arrays, number, 4 + number, with_next=with_next)
    names = [f"demo_{number}".encode() for number in range(12)]
    arrays |= {
        "mask/train": np.array(names[:10], dtype="S8"),
        "mask/valid": np.array(names[10:], dtype="S8"),
        "mask/20_percent": np.array(names[:2], dtype="S8"),
        "mask/20_percent_train": np.array(names[:1], dtype="S8"),
        "mask/20_percent_valid": np.array(names[1:2], dtype="S8"),
    }
    path = write(tmp_path / "low_dim_v141.hdf5", arrays)
    with h5py.File(path, "a") as file:
        file["data"].attrs.update({"total": 114, "env_args": json.dumps({"env_name": "Lift", "env_kwargs": {}})})
        for number in range(12):
            file[f"data/demo_{number}"].attrs.update({"num_samples": 4 + number, "model_file": "<mujoco/>" * 1000})
    keys = ["object", "robot0_eef_pos"]
    plan, rows = transitions_of(path, state_keys=keys)
    assert plan.num_actions.tolist() == [4 + number for number in range(12)]
    assert len(rows) == 114 - (0 if with_next else 12)
    assert plan.given_split is not None
    assert plan.given_split.tolist() == [0] * 10 + [1, 1]
    assert plan.attributes["env_name"] == "Lift"
    assert plan.warnings == ()
    some = open_sequences(str(path), state_keys=keys, options={"mask": "20_percent"}).inspect()
    assert some.given_split is not None
    assert some.given_split.tolist() == [0, 1]
    plan, rows = transitions_of(path, state_keys=["states"], action_key="actions_abs")
    assert (plan.state_dim, len(rows)) == (32, 114 - 12)
