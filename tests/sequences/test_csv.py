from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invdyn.errors import DataError
from invdyn.sequences import csv_folder
from invdyn.sequences.csv_folder import count_lines
from invdyn.sequences.registry import open_sequences
from tests.sequences.reading import transitions_of
from tests.sequences.writers import make_episodes, write_csv


@pytest.mark.parametrize(
    ("state", "action"),
    [
        ("state_{}.csv", "action_{}.csv"),
        ("{}_states.csv", "{}_actions.csv"),
        ("episode_{}/obs.csv", "episode_{}/action.csv"),
        ("observations/{}.csv", "actions/{}.csv"),
        ("run{}/Observation.csv", "run{}/Action.csv"),
    ],
)
def test_names_pair_the_files_in_numeric_order(state: str, action: str, tmp_path: Path) -> None:
    for number in (10, 2):
        for name, rows, columns in ((state, number + 1, 3), (action, number, 1)):
            file = tmp_path / name.format(number)
            file.parent.mkdir(exist_ok=True)
            np.savetxt(file, np.full((rows, columns), number), delimiter=",")
    plan, rows = transitions_of(tmp_path)
    assert plan.num_actions.tolist() == [2, 10]
    assert rows.action[:, 0].tolist() == [2] * 2 + [10] * 10


def test_own_words(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "a.pose.csv", np.ones((4, 3)), delimiter=",")
    np.savetxt(tmp_path / "a.cmd.csv", np.ones((3, 2)), delimiter=",")
    with pytest.raises(DataError, match="0 state files, 0 action files, 2 CSV files"):
        open_sequences(str(tmp_path)).inspect()
    plan, _ = transitions_of(tmp_path, options={"state_word": "pose", "action_word": "cmd"})
    assert plan.num_states.tolist() == [4]


def test_as_many_actions_as_states_leave_the_last_unused(tmp_path: Path) -> None:
    write_csv(tmp_path, make_episodes([5], extra_state=False))
    plan, rows = transitions_of(tmp_path)
    assert (plan.num_states.tolist(), plan.num_actions.tolist(), len(rows)) == ([5], [5], 4)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
@pytest.mark.parametrize("header", ["", "x{0}y", "# x{0}y", '"x"{0}"y"'])
def test_headers_and_delimiters(delimiter: str, header: str, tmp_path: Path) -> None:
    lines = [header.format(delimiter)] * bool(header) + [f"{i}.5{delimiter}-{i}e-1" for i in range(4)]
    (tmp_path / "state_0.csv").write_text("\r\n".join(lines) + "\r\n\r\n")
    (tmp_path / "action_0.csv").write_text("force\n1\n2\n3")
    plan, rows = transitions_of(tmp_path)
    assert (plan.num_states.tolist(), plan.num_actions.tolist()) == ([4], [3])
    np.testing.assert_allclose(rows.state[1], [1.5, -0.1])


@pytest.mark.parametrize("columns", [1, 2])
def test_first_line_that_may_be_names_or_values_must_be_said(columns: int, tmp_path: Path) -> None:
    """pandas heads columns without names by their numbers; a first state or action of such values looks the same."""
    first = ",".join(map(str, range(columns)))
    lines = [first, *(",".join([f"{step}.5"] * columns) for step in range(5))]
    for name in ("state_0.csv", "action_0.csv"):
        (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"clearly names or values: .*_0\.csv: it is '{first}'.*options\.header"):
        open_sequences(str(tmp_path)).inspect()
    _, rows = transitions_of(tmp_path, options={"header": True})
    assert rows.action[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5]
    _, rows = transitions_of(tmp_path, options={"header": False})
    assert rows.action[:, 0].tolist() == [0, 0.5, 1.5, 2.5, 3.5]


def test_whole_numbers_are_values_unless_said(tmp_path: Path) -> None:
    for name in ("state_0.csv", "action_0.csv"):
        (tmp_path / name).write_text("0,1\n2,3\n4,5\n")
    assert transitions_of(tmp_path)[1].action[:, 0].tolist() == [0, 2]
    assert transitions_of(tmp_path, options={"header": True})[1].action[:, 0].tolist() == [2]


def test_columns_make_the_state(tmp_path: Path) -> None:
    episodes = make_episodes([4])
    write_csv(tmp_path, episodes)
    plan, rows = transitions_of(tmp_path, state_keys=["angle", "x"], action_key="torque")
    assert (plan.state_dim, plan.action_dim) == (2, 1)
    np.testing.assert_allclose(rows.state, episodes[0].states[:-1, [2, 0]], rtol=1e-6)
    np.testing.assert_allclose(rows.action[:, 0], episodes[0].actions[:, 1], rtol=1e-6)


def test_missing_partner_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path, make_episodes([4, 5]))
    (tmp_path / "action_1.csv").unlink()
    with pytest.raises(DataError, match=r"must have an action file of the same name: .*state_1\.csv has none"):
        open_sequences(str(tmp_path)).inspect()


def test_files_without_a_partner_can_be_skipped(tmp_path: Path) -> None:
    write_csv(tmp_path, make_episodes([3, 4, 5, 6]))
    (tmp_path / "action_1.csv").unlink()
    (tmp_path / "state_2.csv").unlink()
    reader = open_sequences(str(tmp_path), options={"on_error": "skip"})
    plan = reader.inspect()
    assert plan.num_actions.tolist() == [3, 6]
    assert sorted(Path(path).name for path in plan.skipped) == ["action_2.csv", "state_1.csv"]
    assert all("must have an action file" in reason for reason in plan.skipped.values())
    assert len(reader.read(plan.by_file()[1]).action) == 6


def test_two_files_of_a_kind(tmp_path: Path) -> None:
    write_csv(tmp_path, make_episodes([4]))
    (tmp_path / "states_0.csv").write_text("1,2\n")
    with pytest.raises(DataError, match="an episode must have one file of a kind"):
        open_sequences(str(tmp_path)).inspect()


def test_empty_cell_is_found(tmp_path: Path) -> None:
    write_csv(tmp_path, make_episodes([4]))
    file = tmp_path / "state_0.csv"
    lines = file.read_text().splitlines()
    lines[2] = "1,,3"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match="state holds nan in column 1 at episode 0, step 1"):
        transitions_of(tmp_path)


@pytest.mark.parametrize("name", ["state", "action"])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_line_is_an_empty_cell(name: str, columns: int, end: str, tmp_path: Path) -> None:
    """The other rows would all move up by one."""
    lines = [",".join(["0.5"] * columns)] * 6
    for file in ("state_0.csv", "action_0.csv"):
        (tmp_path / file).write_text(end.join([*lines, "", ""]))
    assert open_sequences(str(tmp_path)).inspect().num_states.tolist() == [6]
    (tmp_path / f"{name}_0.csv").write_text(end.join([*lines[:3], "", *lines[4:], ""]))
    with pytest.raises(DataError, match=rf"{name}_0\.csv: line 4 is blank, and others follow"):
        open_sequences(str(tmp_path)).inspect()


def test_row_with_too_few_cells(tmp_path: Path) -> None:
    write_csv(tmp_path, make_episodes([4]))
    file = tmp_path / "state_0.csv"
    file.write_text(file.read_text().rstrip().rpartition(",")[0] + "\n")
    with pytest.raises(DataError, match=r"state_0.csv: .*Expected 3 columns, got 2"):
        transitions_of(tmp_path)


@given(lines=st.lists(st.sampled_from(["", "1,2", "  ", "\r", "3,4\r", ","]), max_size=30), block=st.integers(1, 9))
def test_lines_are_counted_in_blocks(lines: list[str], block: int) -> None:
    text = "\n".join(lines).encode()
    original, csv_folder.COUNT_BYTES = csv_folder.COUNT_BYTES, block
    try:
        filled = [bool(line.strip("\r")) for line in lines]
        before_last = "".join("01"[line] for line in filled).rstrip("0")
        assert count_lines(io.BytesIO(text)) == (sum(filled), before_last.find("0") + 1)
    finally:
        csv_folder.COUNT_BYTES = original


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write_csv(tmp_path, make_episodes([4]))
    with pytest.raises(DataError, match="must be a folder of state and action files"):
        open_sequences(str(tmp_path / "state_0.csv"), format_name="csv").inspect()


def test_action_files_are_hashed_too(tmp_path: Path) -> None:
    write_csv(tmp_path, make_episodes([4]))
    reader = open_sequences(str(tmp_path))
    file = reader.inspect().files[0]
    assert [Path(path).name for path in reader.source_paths(file)] == ["state_0.csv", "action_0.csv"]
