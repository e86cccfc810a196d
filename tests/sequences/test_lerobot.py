from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from invdyn.errors import DataError
from invdyn.sequences.registry import open_sequences
from tests.sequences.fixtures import real_recording
from tests.sequences.reading import transitions_of
from tests.sequences.writers import (
    frames_table,
    make_episodes,
    write_info,
    write_lerobot_v2,
    write_lerobot_v3,
    write_v3_episodes,
)


def test_gr00t_v20() -> None:
    plan, rows = transitions_of(real_recording("lerobot_v20"))
    assert plan.num_states.tolist() == [416, 470, 470, 412, 328]
    assert (plan.state_dim, plan.action_dim, len(rows)) == (44, 44, 2096 - 5)
    assert plan.attributes["dt_s"] == pytest.approx(0.05)
    assert (rows.state.std(axis=0) == 0).sum() == 18
    assert (rows.action.std(axis=0) == 0).sum() == 25
    assert any("split train is episodes 0:100, but only 5 have rows" in line for line in plan.warnings)


def test_g1_v21() -> None:
    plan, rows = transitions_of(real_recording("lerobot_v21"))
    assert plan.num_states.tolist() == [479, 393, 343, 459]
    assert (plan.state_dim, plan.action_dim, len(rows)) == (26, 26, 1674 - 4)
    assert plan.attributes["dt_s"] == pytest.approx(1 / 30)


def test_v3_boundaries_come_from_the_metadata_not_from_files(tmp_path: Path) -> None:
    episodes = make_episodes([4, 7, 3, 5, 6])
    plan, rows = transitions_of(write_lerobot_v3(tmp_path, episodes))
    assert len(plan.files) == 2
    assert plan.num_states.tolist() == [4, 7, 3, 5, 6]
    assert plan.episode_index.tolist() == [0, 1, 2, 3, 4]
    assert len(rows) == 25 - 5
    assert plan.warnings == ()


@pytest.mark.parametrize("cuts", [[6], [4, 6, 9], [1, 2, 3], [6, 8], [11]])
@pytest.mark.parametrize("without", [[], ["frame_index"], ["frame_index", "index"]])
def test_v3_an_episode_goes_on_in_the_next_file(tmp_path: Path, cuts: list[int], without: list[str]) -> None:
    episodes = make_episodes([4, 7, 3, 5])
    root = write_lerobot_v3(tmp_path, episodes, per_file=4)
    whole = transitions_of(root)
    first = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(first).drop_columns(without)
    folder = root / "data" / "chunk-001"
    folder.mkdir()
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(table)], strict=True)):
        path = first if number == 0 else folder / f"file-{number:03d}.parquet"
        pq.write_table(table.slice(start, stop - start), path, row_group_size=2)
    plan, rows = transitions_of(root)
    assert plan.num_states.tolist() == [4, 7, 3, 5]
    assert plan.episode_index.tolist() == [0, 1, 2, 3]
    assert plan.warnings == ()
    for column in ("state", "action", "next_state", "step"):
        np.testing.assert_array_equal(getattr(rows, column), getattr(whole[1], column))
    assert sum(len(open_sequences(str(root)).source_paths(file)) for file in plan.files) == len(cuts) + 1
    reader = open_sequences(str(root))
    for episode in range(4):
        one = reader.read(plan.slice(episode, episode + 1))
        np.testing.assert_array_equal(one.action, episodes[episode].actions)


def test_a_missing_file_cuts_the_episode_that_goes_on_behind_it(tmp_path: Path) -> None:
    root = write_lerobot_v3(tmp_path, make_episodes([9]), per_file=1)
    first = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(first)
    pq.write_table(table.slice(0, 3), first)
    pq.write_table(table.slice(6), first.with_name("file-002.parquet"))
    plan = open_sequences(str(root)).inspect()
    assert plan.num_states.tolist() == [3, 3]
    assert plan.episode_id(0) == plan.episode_id(1), "the pieces of an episode share a split"
    assert any("frames are missing before 1 files inside episodes" in line for line in plan.warnings)


def test_episodes_of_one_number_that_begin_anew_stay_apart(tmp_path: Path) -> None:
    """Recordings put side by side may each count from 0."""
    root = write_lerobot_v2(tmp_path, make_episodes([4, 5]))
    pq.write_table(frames_table(make_episodes([5])), root / "data/chunk-000/episode_000001.parquet")
    plan = open_sequences(str(root)).inspect()
    assert plan.episode_index.tolist() == [0, 0]
    assert plan.episode_id(0) != plan.episode_id(1)


def test_a_skipped_file_cuts_too_where_frames_have_no_numbers(tmp_path: Path) -> None:
    root = write_lerobot_v3(tmp_path, make_episodes([9]), per_file=1)
    first = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(first).drop_columns(["frame_index", "index"])
    for number in range(3):
        pq.write_table(table.slice(3 * number, 3), first.with_name(f"file-{number:03d}.parquet"))
    assert open_sequences(str(root)).inspect().num_states.tolist() == [9]
    first.with_name("file-001.parquet").write_bytes(b"")
    reader = open_sequences(str(root), options={"on_error": "skip"})
    assert reader.inspect().num_states.tolist() == [3, 3]


def test_v3_reads_a_slice_across_row_groups(tmp_path: Path) -> None:
    episodes = make_episodes([4, 7, 3, 5, 6])
    reader = open_sequences(str(write_lerobot_v3(tmp_path, episodes, per_file=5, rows_per_group=2)))
    part = reader.inspect().slice(1, 4)
    arrays = reader.read(part)
    np.testing.assert_array_equal(arrays.state, np.concatenate([e.states[:-1] for e in episodes[1:4]]))
    np.testing.assert_array_equal(arrays.action, np.concatenate([e.actions for e in episodes[1:4]]))


def test_v3_metadata_cuts_rows_that_share_an_episode_index(tmp_path: Path) -> None:
    """Two recordings joined without renumbering: only the metadata knows the boundary."""
    root = write_lerobot_v3(tmp_path, make_episodes([9]), per_file=1)
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    index = table.schema.get_field_index("frame_index")
    pq.write_table(table.remove_column(index), file)
    write_v3_episodes(root, np.array([4, 5]))
    plan, rows = transitions_of(root)
    assert plan.num_states.tolist() == [4, 5]
    assert len(rows) == 7
    assert any("1 boundaries inside an episode_index" in line for line in plan.warnings)


def test_rows_are_trusted_over_the_metadata(tmp_path: Path) -> None:
    root = write_lerobot_v3(tmp_path, make_episodes([4, 7]))
    write_v3_episodes(root, np.array([11]))
    plan = open_sequences(str(root)).inspect()
    assert plan.num_states.tolist() == [4, 7]
    warnings = " ".join(plan.warnings)
    assert "1 episodes have rows but are not in the metadata (first 1)" in warnings
    assert "episode 0 is listed with 11 rows and has 4" in warnings


def test_v2_metadata_that_disagrees(tmp_path: Path) -> None:
    root = write_lerobot_v2(tmp_path, make_episodes([4, 7]))
    lines = [{"episode_index": 0, "length": 5}, {"episode_index": 1, "length": 7}, {"episode_index": 2, "length": 9}]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    features = {"action": {"dtype": "float32"}, "observation.effort": {"dtype": "float32"}}
    write_info(root, "v2.1", make_episodes([4, 8]), features=features)
    plan = open_sequences(str(root)).inspect()
    assert plan.num_states.tolist() == [4, 7]
    warnings = " ".join(plan.warnings)
    for part in (
        "total_frames 12, the files have 11",
        "lists 3 episodes, 1 without rows (first 2)",
        "episode 0 is listed with 5 rows and has 4",
        "lists the feature observation.effort, the files have no such column",
        "does not list the columns episode_index",
    ):
        assert part in warnings


def test_missing_frames_cut_the_episode(tmp_path: Path) -> None:
    root = write_lerobot_v2(tmp_path, make_episodes([10]))
    file = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table.slice(0, 4), table.slice(6)]), file)
    plan, rows = transitions_of(root)
    assert plan.num_states.tolist() == [4, 4]
    assert plan.episode_index.tolist() == [0, 0]
    assert len(rows) == 6
    assert any("frames are missing at 1 places" in line for line in plan.warnings)


def test_two_episodes_in_a_v2_file(tmp_path: Path) -> None:
    root = write_lerobot_v2(tmp_path, make_episodes([4]))
    pq.write_table(frames_table(make_episodes([4, 5])), root / "data/chunk-000/episode_000000.parquet")
    assert open_sequences(str(root)).inspect().num_states.tolist() == [4, 5]


def test_files_and_chunks_are_in_numeric_order(tmp_path: Path) -> None:
    root = write_lerobot_v2(tmp_path, make_episodes([4, 5, 6]))
    folder = root / "data" / "chunk-001"
    folder.mkdir()
    (root / "data/chunk-000/episode_000002.parquet").rename(folder / "episode_1000000.parquet")
    assert open_sequences(str(root)).inspect().num_states.tolist() == [4, 5, 6]


def test_named_splits_are_given(tmp_path: Path) -> None:
    root = write_lerobot_v2(tmp_path, make_episodes([4, 5, 6]))
    write_info(root, "v2.1", make_episodes([4, 5, 6]), splits={"train": "0:2", "val": "2:3"})
    plan = open_sequences(str(root)).inspect()
    assert plan.given_split is not None
    assert plan.given_split.tolist() == [0, 0, 1]


def test_missing_values_are_found(tmp_path: Path) -> None:
    root = write_lerobot_v2(tmp_path, make_episodes([4]), fixed=False)
    file = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(file)
    values = table.column("action").to_pylist()
    values[2][1] = None
    index = table.schema.get_field_index("action")
    pq.write_table(table.set_column(index, "action", pa.array(values, type=pa.list_(pa.float64()))), file)
    with pytest.raises(DataError, match="action holds nan in column 1 at episode 0, step 2"):
        transitions_of(root)


def test_without_episode_index(tmp_path: Path) -> None:
    root = write_lerobot_v2(tmp_path, make_episodes([4]))
    file = root / "data/chunk-000/episode_000000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["episode_index"]), file)
    with pytest.raises(DataError, match="'episode_index' is missing, so episodes cannot be told apart"):
        open_sequences(str(root)).inspect()


def test_state_from_several_columns_one_a_scalar(tmp_path: Path) -> None:
    root = write_lerobot_v2(tmp_path, make_episodes([4]))
    plan, rows = transitions_of(root, state_keys=["observation.state", "timestamp"])
    assert plan.state_dim == 4
    np.testing.assert_allclose(rows.state[:, 3], [0, 0.05, 0.1])
