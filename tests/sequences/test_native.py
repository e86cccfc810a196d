from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invdyn.errors import DataError
from invdyn.sequences.base import SequencePlan
from invdyn.sequences.native import NativeReader
from tests.sequences.recordings import Episode, make_episodes, write_recording, write_shard


def read_back(reader: NativeReader, plan: SequencePlan) -> list[Episode]:
    episodes = []
    for part in plan.by_file():
        arrays = reader.read(part)
        states = np.split(arrays.state, np.cumsum(part.num_states)[:-1])
        episodes += zip(states, np.split(arrays.action, np.cumsum(part.num_actions)[:-1]), strict=True)
    return episodes


def assert_same(found: list[Episode], expected: list[Episode]) -> None:
    assert len(found) == len(expected)
    for (states, actions), (expected_states, expected_actions) in zip(found, expected, strict=True):
        assert states.dtype == expected_states.dtype
        np.testing.assert_array_equal(states, expected_states)
        np.testing.assert_array_equal(actions, expected_actions)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=9), per_shard=st.integers(1, 4), data=st.data())
def test_any_slice_reads_what_was_recorded(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_shard: int, data: st.DataObject
) -> None:
    episodes = make_episodes(lengths)
    reader = NativeReader(write_recording(tmp_path_factory.mktemp("native"), episodes, episodes_per_shard=per_shard))
    plan = reader.inspect()
    assert plan.num_actions.tolist() == lengths
    assert plan.num_states.tolist() == [length + 1 for length in lengths]
    first = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(first + 1, len(lengths)))
    assert_same(read_back(reader, plan.slice(first, stop)), episodes[first:stop])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.int64, np.uint8])
def test_every_numeric_type(tmp_path: Path, dtype: type) -> None:
    episodes = make_episodes([3, 5], dtype=dtype)
    reader = NativeReader(write_shard(tmp_path / "a.h5", episodes))
    assert_same(read_back(reader, reader.inspect()), episodes)


def test_flat_arrays_have_one_column_and_deep_ones_are_flattened(tmp_path: Path) -> None:
    arrays = {"data/state": np.arange(8.0), "data/action": np.arange(24).reshape(6, 2, 2)}
    reader = NativeReader(write_shard(tmp_path / "a.hdf5", make_episodes([2, 4]), arrays=arrays))
    plan = reader.inspect()
    assert (plan.state_dim, plan.action_dim) == (1, 4)
    (_, _), (states, actions) = read_back(reader, plan)
    assert states.tolist() == [[3.0], [4.0], [5.0], [6.0], [7.0]]
    assert actions[0].tolist() == [8, 9, 10, 11]


def test_flags_are_numbers(tmp_path: Path) -> None:
    actions = np.array([[True, False], [False, True], [True, True]])
    reader = NativeReader(write_shard(tmp_path / "a.hdf5", make_episodes([3]), arrays={"data/action": actions}))
    assert read_back(reader, reader.inspect())[0][1].tolist() == [[1, 0], [0, 1], [1, 1]]


def test_state_is_the_keys_in_the_order_given(tmp_path: Path) -> None:
    arrays = {"data/position": np.arange(6.0).reshape(3, 2), "data/velocity": np.array([7, 8, 9], np.int32)}
    shard = write_shard(tmp_path / "a.hdf5", make_episodes([2]), arrays=arrays, without=["data/state"])
    for keys, row in ((("position", "velocity"), [0, 1, 7]), (("velocity", "position"), [7, 0, 1])):
        reader = NativeReader(shard, state_keys=keys)
        assert reader.inspect().state_dim == 3
        assert read_back(reader, reader.inspect())[0][0][0].tolist() == row


def test_as_many_states_as_actions(tmp_path: Path) -> None:
    episodes = make_episodes([3, 4], states_after=0)
    reader = NativeReader(write_shard(tmp_path / "a.hdf5", episodes, without=["meta/state_ends"]))
    plan = reader.inspect()
    assert plan.num_states.tolist() == plan.num_actions.tolist() == [3, 4]
    assert_same(read_back(reader, plan), episodes)


def test_one_file_is_the_folder_of_that_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard-00000.hdf5", make_episodes([3]))
    plans = [NativeReader(path).inspect() for path in (tmp_path, tmp_path / "shard-00000.hdf5")]
    assert plans[0].episode_id(0) == plans[1].episode_id(0) == "shard-00000.hdf5:0"


def test_only_finished_shards_are_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard-00000.hdf5", make_episodes([3]))
    (tmp_path / ".shard-00001.hdf5.7.tmp").write_bytes(b"half")
    (tmp_path / ".shard-00002.hdf5").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert NativeReader(tmp_path).inspect().num_episodes == 1


def test_a_shard_without_episodes_among_others(tmp_path: Path) -> None:
    episodes = make_episodes([3, 2])
    for index, part in enumerate((episodes[:1], [], episodes[1:])):
        write_shard(tmp_path / f"shard-{index}.hdf5", part)
    reader = NativeReader(tmp_path)
    plan = reader.inspect()
    assert [plan.episode_id(i) for i in range(2)] == ["shard-0.hdf5:0", "shard-2.hdf5:0"]
    assert_same(read_back(reader, plan), episodes)


def test_attributes_of_any_type(tmp_path: Path) -> None:
    attributes = {"env_id": "Pendulum", "task": np.bytes_("lift"), "dt_s": 0.02, "seed": 7, "table": np.zeros(3)}
    write_shard(tmp_path / "a.hdf5", make_episodes([3]), attributes={**attributes, "complex": 1j, "done": True})
    found = NativeReader(tmp_path).inspect().attributes
    assert found == {"env_id": "Pendulum", "task": "lift", "dt_s": 0.02, "seed": 7.0, "done": 1.0}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data/state": np.zeros((9, 3))}, r"lengths disagree: .*a\.hdf5: data/state has 9 rows, .*ends at 8"),
        ({"data/action": np.zeros((5, 2))}, r"lengths disagree: .*data/action has 5 rows, meta/episode_ends ends at 6"),
        ({"meta/state_ends": np.array([8])}, "lengths disagree: .*episode_ends has 2 episodes, meta/state_ends 1"),
        ({"meta/state_ends": np.array([4, 8])}, "lengths disagree: .* episode 0 has 4 states and 2 actions; T actions"),
        ({"meta/episode_ends": np.array([8, 6])}, r"must not decrease: .*a\.hdf5: episode 1 ends at 6, the one before"),
        ({"meta/episode_ends": np.array([-2, 6])}, "must not decrease: .* episode 0 ends at -2"),
        ({"meta/episode_ends": np.array([2.0, 6.0])}, "meta/episode_ends must be a list of whole numbers"),
        ({"meta/episode_ends": np.array([b"2", b"6"])}, "meta/episode_ends must be a list of whole numbers"),
        ({"meta/episode_ends": np.int64(6)}, "meta/episode_ends must be a list of whole numbers"),
        ({"meta/episode_ends/0": np.array([2, 6])}, "meta/episode_ends must be a list of whole numbers"),
        ({"data/state": np.array([b"x"] * 8)}, "data/state must be numeric: .* it is |S1"),
        ({"data/action": np.zeros((6, 2), complex)}, "data/action must be numeric: .* it is complex128"),
        ({"data/state": np.float64(1)}, r"data/state must have a row per step.* its shape is \(\)"),
        ({"data/state": h5py.Empty("f8")}, "data/state must have a row per step.* its shape is None"),
        ({"data/state": np.zeros((8, 0))}, r"data/state must have a row per step.* its shape is \(8, 0\)"),
        ({"data/state/x": np.zeros((8, 3))}, r"key 'data/state' must be an array: .* it is a group; found"),
    ],
)
def test_shards_that_contradict_themselves(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    without = [parent for name in arrays if (parent := name.rpartition("/")[0]) not in ("data", "meta")]
    write_shard(tmp_path / "a.hdf5", make_episodes([2, 4]), arrays=arrays, without=without)
    with pytest.raises(DataError, match=message):
        NativeReader(tmp_path).inspect()


@pytest.mark.parametrize(
    ("state_ends", "action_ends", "message"),
    [
        ([3, 4, 5], [2, 2, 2], r"a\.hdf5: episode 1 has 1 states and 0 actions \(2 such episodes\); remove it from"),
        ([3, 3], [2, 2], "episode 1 has 0 states"),
        ([1, 4], [1, 3], "episode 0 has 1 states and 1 actions"),
    ],
)
def test_short_episodes(tmp_path: Path, state_ends: list[int], action_ends: list[int], message: str) -> None:
    arrays = {
        "data/state": np.zeros((state_ends[-1], 3)),
        "data/action": np.zeros((action_ends[-1], 2)),
        "meta/state_ends": np.array(state_ends),
        "meta/episode_ends": np.array(action_ends),
    }
    write_shard(tmp_path / "a.hdf5", [], arrays=arrays)
    with pytest.raises(DataError, match=f"at least 2 states and 1 action: .*{message}"):
        NativeReader(tmp_path).inspect()


@pytest.mark.parametrize("missing", ["meta/episode_ends", "data/action", "data/state"])
def test_missing_keys_are_told_with_those_found(tmp_path: Path, missing: str) -> None:
    write_shard(tmp_path / "a.hdf5", make_episodes([2, 4]), without=[missing])
    with pytest.raises(DataError, match=rf"'{missing}'.*; found .*meta/state_ends \(2,\)"):
        NativeReader(tmp_path).inspect()


def test_shards_of_different_dimensions(tmp_path: Path) -> None:
    for name, dim in (("a", 3), ("b", 3), ("c", 4)):
        write_shard(tmp_path / f"{name}.hdf5", make_episodes([2], state_dim=dim))
    with pytest.raises(DataError, match=r"a\.hdf5 has state, action \(3, 2\), .*/c\.hdf5 has \(4, 2\)"):
        NativeReader(tmp_path).inspect()


def test_no_recording(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"recording not found: .*/sequence; make it with experiments/collect\.py"):
        NativeReader(tmp_path / "sequence").inspect()
    with pytest.raises(DataError, match=r"recording has no shards: no file ending in \.hdf5 or \.h5"):
        NativeReader(tmp_path).inspect()
    write_shard(tmp_path / "a.hdf5", make_episodes([2]))
    (tmp_path / ".collecting.json").write_text("{}")
    with pytest.raises(DataError, match=r"recording is unfinished: .*run experiments/collect\.py again"):
        NativeReader(tmp_path).inspect()


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.hdf5", make_episodes([20] * 4))
    content = path.read_bytes()
    for size in np.linspace(0, len(content) - 1, 60).astype(int):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"^file is truncated, corrupt or .*a\.hdf5: [^\n]*$"):
            NativeReader(tmp_path).inspect()
        assert not NativeReader.recognises(tmp_path)


def test_damage_inside_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    """HDF5 notices damage at different places in different ways: each is a DataError, and none goes further."""
    path = write_shard(tmp_path / "a.hdf5", make_episodes([20] * 4))
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    errors = []
    for start in range(0, 3000, 20):  # the headers; the arrays are behind
        damaged = bytearray(content)
        damaged[start : start + 20] = generator.bytes(20)
        path.write_bytes(damaged)
        try:
            NativeReader.recognises(tmp_path)
            reader = NativeReader(tmp_path)
            read_back(reader, reader.inspect())
        except DataError as error:
            errors.append(str(error))
    assert len(errors) > 20
    assert all("a.hdf5" in error and "\n" not in error for error in errors)


def test_recording_that_changes_while_it_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.hdf5", make_episodes([2, 4]))
    reader = NativeReader(tmp_path)
    plan = reader.inspect()
    write_shard(tmp_path / "a.hdf5", make_episodes([2, 5]))
    with pytest.raises(DataError, match=r"recording changed while it was read: .*a\.hdf5"):
        reader.read(plan.by_file()[0])
    write_shard(tmp_path / "a.hdf5", make_episodes([2]))
    with pytest.raises(DataError, match=r"recording changed while it was read: .*a\.hdf5"):
        reader.read(plan.by_file()[0])
    (tmp_path / "a.hdf5").unlink()
    with pytest.raises(DataError, match=r"file not found: .*a\.hdf5"):
        reader.read(plan.by_file()[0])
