from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from invdyn.errors import DataError
from invdyn.sequences.registry import open_sequences
from invdyn.transitions.windows import Window
from tests.sequences.reading import transitions_of
from tests.sequences.writers import make_episodes, write_robomimic, write_robomimic_next

TRAIN, VAL = 0, 1


def test_demos_are_in_numeric_order_and_numbers_may_have_gaps(tmp_path: Path) -> None:
    episodes = make_episodes([3, 4, 5])
    plan, rows = transitions_of(write_robomimic(tmp_path, episodes, numbers=[10, 2, 1]))
    assert plan.episode_index.tolist() == [1, 2, 10]
    assert plan.num_states.tolist() == [5, 4, 3]
    np.testing.assert_array_equal(rows.action[:4], episodes[2].actions[:4])


def rename(path: Path, names: dict[str, str]) -> None:
    with h5py.File(path, "a") as file:
        for old, new in names.items():
            file.move(old, new)


def test_numbers_may_have_zeros_before_them(tmp_path: Path) -> None:
    episodes = make_episodes([3, 4, 5])
    path = write_robomimic(tmp_path, episodes)
    rename(path, {"data/demo_0": "data/demo_003", "data/demo_1": "data/demo_12", "data/demo_2": "data/demo_001"})
    plan, rows = transitions_of(path)
    assert plan.episode_index.tolist() == [1, 3, 12]
    np.testing.assert_array_equal(rows.action[:4], episodes[2].actions[:4])
    rename(path, {"data/demo_12": "data/demo_1"})
    with pytest.raises(DataError, match=r"must have different numbers: .*low_dim\.hdf5: found demo_001 and demo_1;"):
        open_sequences(str(path)).inspect()


def test_without_next_obs_the_last_row_has_no_next_state(tmp_path: Path) -> None:
    plan, rows = transitions_of(write_robomimic(tmp_path, make_episodes([5, 4])))
    assert len(rows) == 4 + 3
    assert Window().count_drops(plan.num_states, plan.num_actions)["no_next_state"] == 2


def test_next_obs_gives_every_row(tmp_path: Path) -> None:
    plan, rows = transitions_of(write_robomimic_next(tmp_path, make_episodes([5, 4])))
    assert len(rows) == 9
    assert plan.drops == {}


def test_last_next_obs_that_copies_obs_is_dropped_and_counted(tmp_path: Path) -> None:
    episodes = make_episodes([5, 4])
    path = write_robomimic_next(tmp_path, episodes)
    with h5py.File(path, "a") as file:
        file["data/demo_0/next_obs/state"][-1] = file["data/demo_0/obs/state"][-1]
    plan, rows = transitions_of(path)
    assert plan.drops == {"last_next_obs_is_copy_of_obs": 1}
    assert len(rows) == 4 + 4
    np.testing.assert_array_equal(rows.action[:4], episodes[0].actions[:4])


def test_a_last_step_in_which_only_one_key_rests_is_kept(tmp_path: Path) -> None:
    path = write_robomimic_next(tmp_path, make_episodes([5]))
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        demo["obs/object"], demo["next_obs/object"] = np.ones((5, 2)), np.ones((5, 2))
    plan, rows = transitions_of(path, state_keys=["object"])
    assert plan.drops == {}
    assert len(rows) == 5


def test_next_obs_that_does_not_chain_cuts_and_loses_nothing(tmp_path: Path) -> None:
    episodes = make_episodes([6])
    path = write_robomimic_next(tmp_path, episodes)
    with h5py.File(path, "a") as file:
        file["data/demo_0/next_obs/state"][2] = [7, 8, 9]
    plan, rows = transitions_of(path)
    assert plan.num_actions.tolist() == [3, 3]
    assert plan.episode_index.tolist() == [0, 0]
    assert "next_obs is not always the obs" in plan.warnings[0]
    assert len(rows) == 6
    np.testing.assert_array_equal(rows.next_state[2], [7, 8, 9])
    np.testing.assert_array_equal(rows.state[3], episodes[0].states[3])


def test_masks_give_splits(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path, make_episodes([3, 3, 3, 3]))
    with h5py.File(path, "a") as file:
        file["mask/train"] = np.array([b"demo_0", b"demo_3"])
        file["mask/valid"] = np.array([b"demo_2"])
        file["mask/better"] = np.array([b"demo_0", b"demo_1"])
    plan = open_sequences(str(path)).inspect()
    assert plan.given_split is not None
    assert plan.given_split.tolist() == [TRAIN, -1, VAL, TRAIN]
    assert plan.slice(2, 4).given_split.tolist() == [VAL, TRAIN]  # type: ignore[union-attr]


def test_demo_in_two_splits_is_in_none_and_named(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path, make_episodes([3, 3]))
    with h5py.File(path, "a") as file:
        file["mask/train"] = np.array([b"demo_0", b"demo_1"])
        file["mask/valid"] = np.array([b"demo_1"])
    plan = open_sequences(str(path)).inspect()
    assert plan.given_split is not None
    assert plan.given_split.tolist() == [TRAIN, -1]
    assert any("demo_1" in line and "several splits" in line for line in plan.warnings)


def test_mask_chooses_demos_and_its_own_splits(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path, make_episodes([3, 4, 5]))
    with h5py.File(path, "a") as file:
        file["mask/20_percent"] = np.array([b"demo_1", b"demo_2"])
        file["mask/20_percent_valid"] = np.array([b"demo_2"])
    plan, _ = transitions_of(path, options={"mask": "20_percent"})
    assert plan.episode_index.tolist() == [1, 2]
    assert plan.drops == {"not_in_mask": 3}
    assert plan.given_split is not None
    assert plan.given_split.tolist() == [-1, VAL]
    with pytest.raises(DataError, match=r"mask 'half' is missing: .*found 20_percent, 20_percent_valid"):
        open_sequences(str(path), options={"mask": "half"}).inspect()


def test_demos_outside_the_mask_are_not_looked_at(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path, make_episodes([3, 4, 5]))
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs"]
        file["mask/good"] = np.array([b"demo_1", b"demo_2"])
    _, rows = transitions_of(path, state_keys=["state"], options={"mask": "good"})
    assert len(rows) == 3 + 4


def test_several_observation_keys_must_be_chosen(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path, make_episodes([3]))
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/eef_pos"] = np.ones((3, 3))
    with pytest.raises(DataError, match=r"shape_meta.obs must name .*obs/eef_pos \(3, 3\), obs/state \(3, 3\)"):
        open_sequences(str(path)).inspect()
    plan, rows = transitions_of(path, state_keys=["eef_pos", "state"])
    assert plan.state_dim == 6
    np.testing.assert_array_equal(rows.state[:, :3], 1)


def test_images_do_not_hide_the_only_vector(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path, make_episodes([3]))
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/image"] = np.zeros((3, 8, 8, 3), np.uint8)
    assert open_sequences(str(path)).inspect().state_dim == 3


def test_simulator_states_before_the_step(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path, make_episodes([4]))
    with h5py.File(path, "a") as file:
        file["data/demo_0/states"] = np.arange(4.0)[:, None]
    _, rows = transitions_of(path, state_keys=["states"])
    assert rows.state[:, 0].tolist() == [0, 1, 2]
    assert rows.next_state[:, 0].tolist() == [1, 2, 3]


def write_isaac_lab(folder: Path, *, initial: bool = True) -> tuple[Path, np.ndarray]:
    """Isaac Lab: states after the step, the previous action among the observations, success flags."""
    folder.mkdir(exist_ok=True)
    path = folder / "dataset.hdf5"
    actions = np.arange(10.0, 15.0)[:, None]
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = '{"env_name": "Isaac-Lift", "type": 2}'
        demo = data.create_group("demo_0")
        demo.attrs["num_samples"], demo.attrs["success"] = 5, True
        demo["actions"] = actions
        demo["obs/actions"] = np.concatenate([[[0.0]], actions[:-1]])
        demo["obs/joint_pos"] = np.arange(5.0)[:, None]
        demo["states/articulation/robot/joint_position"] = np.arange(1.0, 6.0)[:, None]
        if initial:
            demo["initial_state/articulation/robot/joint_position"] = np.array([[0.0]])
    return path, actions


def test_isaac_lab_states_are_after_the_step(tmp_path: Path) -> None:
    path, actions = write_isaac_lab(tmp_path)
    key = "states/articulation/robot/joint_position"
    plan, rows = transitions_of(path, state_keys=[key])
    assert rows.state[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert rows.next_state[:, 0].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(rows.action, actions)
    assert plan.success is not None
    assert plan.success.tolist() == [1]
    assert plan.attributes["env_name"] == "Isaac-Lift"
    # Before and after the step, side by side: both columns must agree, and only what both know counts.
    _, both = transitions_of(path, state_keys=["joint_pos", key])
    np.testing.assert_array_equal(both.state[:, 0], both.state[:, 1])
    assert len(both) == 4


def test_isaac_lab_without_the_initial_state_drops_the_first_action(tmp_path: Path) -> None:
    path, actions = write_isaac_lab(tmp_path, initial=False)
    key = "states/articulation/robot/joint_position"
    plan, rows = transitions_of(path, state_keys=[key])
    assert plan.drops == {"no_state_before_action": 1}
    assert rows.state[:, 0].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(rows.action, actions[1:])
    _, both = transitions_of(path, state_keys=["joint_pos", key])
    np.testing.assert_array_equal(both.state[:, 0], both.state[:, 1])


def test_isaac_lab_previous_action_is_warned_about(tmp_path: Path) -> None:
    path, _ = write_isaac_lab(tmp_path)
    plan = open_sequences(str(path), state_keys=["joint_pos", "actions"]).inspect()
    assert plan.state_dim == 2
    assert any("state key actions holds the previous action" in line for line in plan.warnings)


def test_data_group_without_demos(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_group("data").attrs["total"] = 0
    with pytest.raises(DataError, match=r"at least one episode: .*x.hdf5: group 'data' has no demo_<number>"):
        open_sequences(str(tmp_path)).inspect()


def test_demos_at_the_root_are_named_and_mapped_by_config(tmp_path: Path) -> None:
    episodes = make_episodes([4, 5])
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for number, episode in enumerate(episodes):
            file[f"demo_{number}/observation"] = episode.states[:-1]
            file[f"demo_{number}/action"] = episode.actions
    with pytest.raises(DataError) as error:
        open_sequences(str(tmp_path)).inspect()
    message = str(error.value)
    for part in (
        "2 are at the root (demo_0 .. demo_1)",
        "observation (4, 3)",
        "format_options: {demo_group: /}",
        "shape_meta.obs: {observation: {}}",
        "shape_meta.action_key: action",
    ):
        assert part in message
    _, rows = transitions_of(tmp_path, state_keys=["observation"], action_key="action", options={"demo_group": "/"})
    assert len(rows) == 3 + 4


def test_num_samples_that_disagrees_is_warned_about(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path, make_episodes([4]))
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["num_samples"] = 9
    plan = open_sequences(str(path)).inspect()
    assert plan.num_actions.tolist() == [4]
    assert "num_samples says 9, the arrays have 4 rows" in plan.warnings[0]
