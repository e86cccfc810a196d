from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from invdyn.errors import DataError
from invdyn.sequences.registry import open_sequences
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.plan import SPLITS
from invdyn.transitions.store import COLUMNS
from tests.sequences.fixtures import real_recording
from tests.sequences.reading import transitions_of
from tests.sequences.writers import make_episodes, write_minari


def test_pendulum_actions_follow_from_the_states(tmp_path: Path) -> None:
    """Every one of the 11,200 extracted rows obeys the simulator's law, forwards and backwards.

    u = clip(a, -2, 2); w' = clip(w + (15 sin(theta) + 3 u) dt, -8, 8); theta' = theta + w' dt. At the speed limit the
    step would not tell u; this recording never reaches it.
    """
    path = real_recording("minari/imitation/pendulum-expert-v0")
    config = DatasetConfig(name="pendulum", buffer_path=str(path), output_path=str(tmp_path / "out"))
    store = create_dataset(config, local=True)
    rows = {name: np.concatenate([store.load(split)[name] for split in SPLITS]) for name in COLUMNS}
    assert store.manifest["num_rows"] == len(rows["state"]) == 11_200
    assert len(np.unique(rows["episode"])) == 56
    (cosine, sine, speed), action = rows["state"].astype(np.float64).T, rows["action"][:, 0].astype(np.float64)
    next_cosine, next_sine, next_speed = rows["next_state"].astype(np.float64).T
    applied = np.clip(action, -2, 2)

    predicted = np.clip(speed + (15 * sine + 3 * applied) * 0.05, -8, 8)
    np.testing.assert_allclose(predicted, next_speed, rtol=0, atol=1e-5)
    turned = np.arctan2(sine, cosine) + predicted * 0.05
    np.testing.assert_allclose(np.cos(turned), next_cosine, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.sin(turned), next_sine, rtol=0, atol=1e-5)

    recovered = ((next_speed - speed) / 0.05 - 15 * sine) / 3
    assert np.abs(next_speed).max() < 8
    np.testing.assert_allclose(recovered, applied, rtol=0, atol=1e-5)


def test_the_dataset_is_found_from_folders_above_and_below() -> None:
    root = real_recording("minari")
    folders = (root, root / "imitation/pendulum-expert-v0", root / "imitation/pendulum-expert-v0/data")
    assert [open_sequences(str(folder)).inspect().num_episodes for folder in folders] == [56] * 3


def test_episodes_are_in_numeric_order(tmp_path: Path) -> None:
    episodes = make_episodes(range(2, 14))
    plan, _ = transitions_of(write_minari(tmp_path, episodes))
    assert plan.episode_index.tolist() == list(range(12))
    assert plan.num_actions.tolist() == list(range(2, 14))


def nest(path: Path, space: str) -> Path:
    """Turn the observations and actions into a Dict or a Tuple."""
    names = {"dict": ("pose", "goal"), "tuple": ("_index_0", "_index_1")}[space]
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        for episode in file.values():
            states, actions = episode["observations"][()], episode["actions"][()]
            del episode["observations"], episode["actions"]
            episode[f"observations/{names[0]}"], episode[f"observations/{names[1]}"] = states, states[:, :1]
            episode[f"actions/{names[0]}"] = actions
            episode["infos/qpos"] = states[:, :2]
    return path


@pytest.mark.parametrize(("space", "first", "second"), [("dict", "pose", "goal"), ("tuple", "_index_0", "_index_1")])
def test_nested_spaces(space: str, first: str, second: str, tmp_path: Path) -> None:
    episodes = make_episodes([4, 5])
    path = nest(write_minari(tmp_path, episodes), space)
    with pytest.raises(DataError, match=rf"shape_meta.obs must name .*episode_0: .*observations/{first} \(5, 3\)"):
        open_sequences(str(path)).inspect()
    with pytest.raises(DataError, match=rf"key 'actions' must be an array: .*a group; found actions/{first}"):
        open_sequences(str(path), state_keys=[first]).inspect()
    plan, rows = transitions_of(path, state_keys=[second, first, "infos/qpos"], action_key=f"actions/{first}")
    assert plan.state_dim == 6
    expected = np.concatenate([e.states[:-1] for e in episodes])
    np.testing.assert_array_equal(rows.state, np.concatenate([expected[:, :1], expected, expected[:, :2]], axis=1))


def test_discrete_actions(tmp_path: Path) -> None:
    path = write_minari(tmp_path, make_episodes([4]))
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        del file["episode_0/actions"]
        file["episode_0/actions"] = np.array([0, 1, 2, 1])
    _, rows = transitions_of(path)
    assert rows.action[:, 0].tolist() == [0, 1, 2, 1]


def test_metadata_in_root_attributes(tmp_path: Path) -> None:
    path = write_minari(tmp_path, make_episodes([4]))
    (path / "data/metadata.json").unlink()
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        file.attrs["dataset_id"], file.attrs["total_episodes"] = "old/data-v0", 3
        file.attrs["env_spec"] = json.dumps({"id": "Pendulum-v1"})
    plan = open_sequences(str(path)).inspect()
    assert plan.attributes == {"dataset_id": "old/data-v0", "env_name": "Pendulum-v1"}
    assert "says total_episodes 3, the file has 1" in plan.warnings[0]


def test_observations_without_the_last_one(tmp_path: Path) -> None:
    path = write_minari(tmp_path, make_episodes([4]))
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        values = file["episode_0/observations"][:-1]
        del file["episode_0/observations"]
        file["episode_0/observations"] = values
    with pytest.raises(DataError, match=r"episode_0: observations has 4 rows, actions 4; .*T \+ 1 observations"):
        open_sequences(str(path)).inspect()


def test_several_datasets_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_minari(tmp_path / name, make_episodes([4]))
    with pytest.raises(DataError, match=r"must name one Minari dataset: .* holds 2"):
        open_sequences(str(tmp_path)).inspect()


def test_numbers_may_have_zeros_before_them(tmp_path: Path) -> None:
    episodes = make_episodes([3, 4])
    path = write_minari(tmp_path, episodes)
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        file.move("episode_0", "episode_010")
        file.move("episode_1", "episode_002")
    plan, rows = transitions_of(path)
    assert plan.episode_index.tolist() == [2, 10]
    np.testing.assert_array_equal(rows.action[:4], episodes[1].actions)
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        file.copy("episode_002", "episode_2")
    with pytest.raises(DataError, match=r"must have different numbers: .*found episode_002 and episode_2;"):
        open_sequences(str(path)).inspect()
