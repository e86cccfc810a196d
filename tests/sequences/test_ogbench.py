from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from invdyn.errors import DataError
from invdyn.sequences.registry import open_sequences
from tests.sequences.reading import transitions_of
from tests.sequences.writers import make_episodes, write_ogbench, write_ogbench_stored


def test_terminals_mark_the_last_state_whose_action_is_dropped(tmp_path: Path) -> None:
    episodes = make_episodes([4, 5])
    plan, rows = transitions_of(write_ogbench(tmp_path, episodes))
    assert plan.num_states.tolist() == [5, 6]
    assert plan.num_actions.tolist() == [4, 5]
    assert plan.drops == {"action_of_last_state": 2}
    np.testing.assert_array_equal(rows.action, np.concatenate([e.actions for e in episodes]))


def test_a_trajectory_that_the_file_cuts(tmp_path: Path) -> None:
    path = write_ogbench(tmp_path, make_episodes([4, 5]))
    arrays = dict(np.load(path))
    np.savez(path, **{name: values[:-1] for name, values in arrays.items()})
    plan, rows = transitions_of(path)
    assert plan.num_states.tolist() == [5, 5]
    assert plan.num_actions.tolist() == [4, 5], "the last action is real, only its next state is missing"
    assert plan.drops == {"action_of_last_state": 1}
    assert len(rows) == 4 + 4


def test_validation_file_is_the_validation_split(tmp_path: Path) -> None:
    path = write_ogbench(tmp_path, make_episodes([4, 5]))
    (tmp_path / "val").mkdir()
    write_ogbench(tmp_path / "val", make_episodes([3], seed=1)).rename(tmp_path / "play-v0-val.npz")
    for opened in (path, tmp_path):
        plan = open_sequences(str(opened)).inspect()
        by_file = {
            file.name: plan.given_split[plan.file_index == i].tolist()  # type: ignore[index]
            for i, file in enumerate(plan.files)
        }
        assert by_file == {"play-v0.npz": [0, 0], "play-v0-val.npz": [1]}
    assert open_sequences(str(tmp_path / "play-v0-val.npz")).inspect().num_episodes == 1


def test_without_validation_file_no_split_is_given(tmp_path: Path) -> None:
    assert open_sequences(str(write_ogbench(tmp_path, make_episodes([4])))).inspect().given_split is None


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_order_and_compression(order: str, save: object, tmp_path: Path) -> None:
    path = write_ogbench(tmp_path, make_episodes([4, 5, 6]))
    arrays = dict(np.load(path))
    expected, _ = (
        arrays["observations"],
        save(  # type: ignore[operator]
            path,
            **{**arrays, "observations": np.asarray(arrays["observations"], order=order)},  # type: ignore[call-overload]
        ),
    )
    reader = open_sequences(str(path))
    part = reader.inspect().slice(1, 3)
    np.testing.assert_array_equal(reader.read(part).state, expected[5:])


@pytest.mark.parametrize("columns", [1, 2])
def test_terminals_hold_a_flag_per_row(columns: int, tmp_path: Path) -> None:
    path = write_ogbench(tmp_path, make_episodes([4, 5]))
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "terminals": np.repeat(arrays["terminals"][:, None], columns, axis=1)})
    if columns == 1:
        assert open_sequences(str(path)).inspect().num_states.tolist() == [5, 6]
        return
    with pytest.raises(
        DataError, match=r"terminals must hold one flag per row: .*play-v0\.npz: its shape is \(11, 2\)"
    ):
        open_sequences(str(path)).inspect()


def test_other_arrays_can_be_the_state(tmp_path: Path) -> None:
    path = write_ogbench_stored(tmp_path, make_episodes([4]))
    np.savez(path, **dict(np.load(path)), qpos=np.arange(10.0).reshape(5, 2))
    plan, rows = transitions_of(path, state_keys=["qpos"])
    assert plan.state_dim == 2
    assert rows.next_state[:, 0].tolist() == [2, 4, 6, 8]
