from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from invdyn.errors import DataError
from invdyn.sequences import d4rl
from invdyn.sequences.registry import open_sequences
from tests.sequences.fixtures import real_recording
from tests.sequences.reading import transitions_of
from tests.sequences.writers import make_episodes, write_d4rl, write_d4rl_next


def test_maze2d_goal_flags_leave_no_stale_transition() -> None:
    path = real_recording("d4rl/maze2d-umaze-v1.hdf5")
    plan, rows = transitions_of(path)
    assert (plan.state_dim, plan.action_dim) == (4, 2)
    assert len(rows) == 10_000 - 136 - 1
    assert not (rows.state == rows.next_state).all(axis=1).any()
    # As one trajectory, the simulation goes on, and exactly the rows after the flags are stale.
    _, whole = transitions_of(path, options={"episode_ends": []})
    with h5py.File(path) as file:
        flags = np.flatnonzero(file["terminals"][()])
    stale = np.flatnonzero((whole.state == whole.next_state).all(axis=1))
    assert len(flags) == 136
    np.testing.assert_array_equal(stale, flags)


def test_fetch_push_infos_may_be_an_array() -> None:
    plan, rows = transitions_of(real_recording("d4rl/FetchPush-v2.hdf5"))
    assert plan.num_actions.tolist() == [50, 50, 50]
    assert (plan.state_dim, plan.action_dim, len(rows)) == (28, 4, 150)
    with h5py.File(real_recording("d4rl/FetchPush-v2.hdf5")) as file:
        np.testing.assert_array_equal(rows.next_state, file["next_observations"][()].astype(np.float32))


def test_pushball_every_row_is_a_transition() -> None:
    path = real_recording("d4rl/pushball-expert.hdf5")
    plan, rows = transitions_of(path)
    assert plan.num_actions.tolist() == [500] * 100
    assert plan.warnings == ()
    with h5py.File(path) as file:
        np.testing.assert_array_equal(rows.state, file["observations"][()])
        np.testing.assert_array_equal(rows.next_state, file["next_observations"][()])


def test_an_end_is_a_terminal_or_a_timeout(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path, make_episodes([4, 5, 6]))
    with h5py.File(path, "a") as file:
        file["terminals"][3], file["timeouts"][3] = True, False
    plan = open_sequences(str(path)).inspect()
    assert plan.num_states.tolist() == [4, 5, 6]


def test_only_the_wanted_flags_end_an_episode(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path, make_episodes([4, 5, 6]))
    with h5py.File(path, "a") as file:
        file["terminals"][1] = True
    assert open_sequences(str(path)).inspect().num_states.tolist() == [2, 2, 5, 6]
    plan = open_sequences(str(path), options={"episode_ends": "timeouts"}).inspect()
    assert plan.num_states.tolist() == [4, 5, 6]


@pytest.mark.parametrize("explicit", [False, True])
def test_the_end_of_the_file_ends_the_last_episode(explicit: bool, tmp_path: Path) -> None:
    path = (write_d4rl_next if explicit else write_d4rl)(tmp_path, make_episodes([4, 5]))
    with h5py.File(path, "a") as file:
        file["timeouts"][-1] = False
    plan, rows = transitions_of(path)
    assert plan.num_actions.tolist() == [4, 5]
    assert len(rows) == (9 if explicit else 7)


def test_arrays_may_have_one_dimension_or_a_trailing_one(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path, make_episodes([4, 5]))
    with h5py.File(path, "a") as file:
        flat = file["actions"][:, 0]
        del file["actions"]
        file["actions"] = flat
        assert file["terminals"].shape == (9, 1)
    plan, rows = transitions_of(path)
    assert plan.action_dim == 1
    assert rows.action[:, 0].tolist() == [*flat[:3], *flat[4:8]]


def test_file_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least one episode: .*d4rl.hdf5: its arrays have 0 rows"):
        open_sequences(str(write_d4rl(tmp_path, []))).inspect()


def test_without_any_flag(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path, make_episodes([4]))
    with h5py.File(path, "a") as file:
        del file["terminals"], file["timeouts"]
    with pytest.raises(DataError, match=r"neither 'terminals' nor 'timeouts'.*format_options.episode_ends"):
        open_sequences(str(path)).inspect()


@pytest.mark.parametrize("scan_bytes", [d4rl.SCAN_BYTES, 1])
def test_next_observations_that_do_not_chain_cut_and_lose_nothing(
    scan_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d4rl, "SCAN_BYTES", scan_bytes)
    path = write_d4rl_next(tmp_path, make_episodes([6, 5]))
    with h5py.File(path, "a") as file:
        file["next_observations"][2] = [7, 8, 9]
        observations, next_observations = file["observations"][()], file["next_observations"][()]
    plan, rows = transitions_of(path)
    assert plan.num_actions.tolist() == [3, 3, 5]
    assert plan.episode_index.tolist() == [0, 0, 1], "pieces of one episode share its number"
    assert "at 1 rows inside episodes" in plan.warnings[0]
    np.testing.assert_array_equal(rows.state, observations)
    np.testing.assert_array_equal(rows.next_state, next_observations)


def test_shuffled_rows_stay_transitions(tmp_path: Path) -> None:
    """A replay buffer whose rows are in no order: each is a transition of its own."""
    path = write_d4rl_next(tmp_path, make_episodes([6, 5]))
    order = np.random.default_rng(0).permutation(11)
    with h5py.File(path, "a") as file:
        for key in ("observations", "actions", "next_observations", "timeouts"):
            file[key][...] = file[key][()][order]
        expected = {key: file[key][()] for key in ("observations", "actions", "next_observations")}
    _, rows = transitions_of(path)
    np.testing.assert_array_equal(rows.state, expected["observations"])
    np.testing.assert_array_equal(rows.action, expected["actions"])
    np.testing.assert_array_equal(rows.next_state, expected["next_observations"])


def test_nested_keys(tmp_path: Path) -> None:
    path = write_d4rl_next(tmp_path, make_episodes([4, 5]))
    with h5py.File(path, "a") as file:
        file["infos/qpos"] = np.arange(18.0).reshape(9, 2)
    plan, rows = transitions_of(path, state_keys=["infos/qpos", "observations"])
    assert plan.state_dim == 5
    # No next value of infos/qpos is recorded, so that the last row of an episode has no next state.
    assert len(rows) == 3 + 4


def test_next_observations_of_another_shape(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path, make_episodes([4]))
    with h5py.File(path, "a") as file:
        file["next_observations"] = np.zeros((3, 3))
    with pytest.raises(DataError, match=r"lengths disagree: .*observations \(4, 3\) and next_observations \(3, 3\)"):
        open_sequences(str(path)).inspect()


def test_flags_are_one_per_row(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path, make_episodes([4, 5]))
    with h5py.File(path, "a") as file:
        del file["terminals"]
        file["terminals"] = np.zeros((9, 2), bool)
    with pytest.raises(DataError, match=r"terminals must hold one flag per row: .*d4rl\.hdf5: its shape is \(9, 2\)"):
        open_sequences(str(path)).inspect()
