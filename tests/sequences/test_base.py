from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invdyn.errors import DataError
from invdyn.sequences.base import EpisodeArrays, SequencePlan, SourceFile, check_finite
from invdyn.sequences.files import natural_key


def plan_of(num_states: list[int], num_actions: list[int], file_index: list[int] | None = None) -> SequencePlan:
    files = np.array(file_index or [0] * len(num_states), dtype=np.int64)
    return SequencePlan(
        files=tuple(SourceFile(f"/data/{name}.hdf5", f"{name}.hdf5", 1, 1) for name in "abcd"),
        file_index=files,
        episode_index=np.array([int((files[:i] == files[i]).sum()) for i in range(len(files))], dtype=np.int64),
        num_states=np.array(num_states, dtype=np.int64),
        num_actions=np.array(num_actions, dtype=np.int64),
        state_dim=2,
        action_dim=1,
        attributes={},
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12).map(sorted), st.data())
def test_slices_keep_identities_and_one_file_each(files: list[int], data: st.DataObject) -> None:
    plan = plan_of([3] * len(files), [2] * len(files), files)
    identities = [plan.episode_id(i) for i in range(plan.num_episodes)]
    assert len(set(identities)) == len(identities)
    first = data.draw(st.integers(0, len(files) - 1))
    stop = data.draw(st.integers(first + 1, len(files)))
    part = plan.slice(first, stop)
    assert [part.episode_id(i) for i in range(part.num_episodes)] == identities[first:stop]
    pieces = part.by_file()
    assert all(len(piece.files) == 1 for piece in pieces)
    assert [piece.episode_id(i) for piece in pieces for i in range(piece.num_episodes)] == identities[first:stop]


@given(st.permutations(["ep_01", "ep_1", "ep_2", "ep_3²3", "ep_10", "ep_x", "ep_x1"]))
def test_names_are_in_numeric_order_whatever_order_they_come_in(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == ["ep_01", "ep_1", "ep_2", "ep_3²3", "ep_10", "ep_x", "ep_x1"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(dtype: type, value: float) -> None:
    plan = plan_of([4, 5, 3], [3, 4, 2], [0, 1, 1])
    state, action = np.zeros((12, 2), dtype), np.zeros((9, 1), dtype)
    state[6, 1] = value
    with pytest.raises(
        DataError, match=rf"finite: /data/b\.hdf5: state holds {value} in column 1 at episode 0, step 2 "
    ):
        check_finite(EpisodeArrays(state, action), plan)
    action[8, 0] = value
    with pytest.raises(
        DataError, match=rf"action holds {value} in column 0 at episode 1, step 1 \(1 such rows in 9 read"
    ):
        check_finite(EpisodeArrays(np.zeros_like(state), action), plan)


def test_infinities_that_cancel_are_found() -> None:
    state = np.zeros((4, 2))
    state[1], state[2] = np.inf, -np.inf
    with pytest.raises(DataError, match=r"step 1 \(2 such rows in 4 read\)"):
        check_finite(EpisodeArrays(state, np.zeros((3, 1))), plan_of([4], [3]))


def test_values_beyond_float32_are_found() -> None:
    state = np.full((4, 2), 1e38)
    check_finite(EpisodeArrays(state, np.zeros((3, 1))), plan_of([4], [3]))  # the sum overflows, no value does
    state[2, 1] = -1e300
    with pytest.raises(DataError, match=r"finite as float32: .* state holds -1e\+300 in column 1 at episode 0, step 2"):
        check_finite(EpisodeArrays(state, np.zeros((3, 1))), plan_of([4], [3]))


def test_integers_are_finite() -> None:
    state = np.full((4, 2), np.iinfo(np.int64).max)
    check_finite(EpisodeArrays(state, np.zeros((3, 1), np.uint8)), plan_of([4], [3]))
