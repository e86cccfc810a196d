from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from invdyn.errors import DataError
from invdyn.sequences.registry import open_sequences
from invdyn.transitions.windows import Window
from tests.sequences.fixtures import real_recording
from tests.sequences.reading import transitions_of
from tests.sequences.writers import make_episodes, write_zarr

zarr = pytest.importorskip("zarr")


def test_pusht_obeys_its_law_with_one_past_state() -> None:
    path = real_recording("diffusion_policy/pusht_160.zarr")
    plan, rows = transitions_of(path, Window(history=1, horizon=1))
    assert (plan.num_episodes, plan.state_dim, plan.action_dim) == (160, 5, 2)
    assert plan.num_states.sum() == 19_538
    assert len(rows) == 19_538 - 2 * 160
    _, pairs = transitions_of(path)
    assert len(pairs) == 19_538 - 160
    # p[t+1] = .6978 p[t] - .1074 p[t-1] + .2957 a[t] + .1139 a[t-1], in pixels.
    reader = open_sequences(str(path))
    arrays = reader.read(plan)
    before = np.ones(len(arrays.action), bool)
    starts = np.cumsum(plan.num_states) - plan.num_states
    before[starts] = False
    before[np.cumsum(plan.num_states) - 1] = False
    now = np.flatnonzero(before)
    terms = (arrays.state[now, :2], arrays.state[now - 1, :2], arrays.action[now], arrays.action[now - 1])
    inputs = np.stack([term.astype(np.float64).reshape(-1) for term in terms], axis=1)
    target = arrays.state[now + 1, :2].astype(np.float64).reshape(-1)
    law, *_ = np.linalg.lstsq(inputs, target, rcond=None)
    np.testing.assert_allclose(law, [0.6978, -0.1074, 0.2957, 0.1139], atol=1e-4)
    assert np.abs(inputs @ law - target).max() < 1e-4


def test_chunks_cross_episodes(tmp_path: Path) -> None:
    episodes = make_episodes([5, 9, 4])
    reader = open_sequences(str(write_zarr(tmp_path, episodes, chunk_rows=7)))
    plan = reader.inspect()
    np.testing.assert_array_equal(reader.read(plan.slice(1, 2)).state, episodes[1].states[:-1])


def test_episodes_without_rows_are_left_out_and_named(tmp_path: Path) -> None:
    plan, rows = transitions_of(write_zarr(tmp_path, make_episodes([5, 0, 4])))
    assert plan.episode_index.tolist() == [0, 2]
    assert len(rows) == 4 + 3
    assert "1 episodes have no rows" in plan.warnings[0]


def test_decreasing_ends(tmp_path: Path) -> None:
    path = write_zarr(tmp_path, make_episodes([5, 4]))
    meta = zarr.open_group(str(path), mode="a", zarr_format=2)["meta"]
    meta.create_array("episode_ends", data=np.array([5, 3, 9]), overwrite=True)
    with pytest.raises(DataError, match=r"meta/episode_ends must not decrease: .*\[5, 3, 9\]"):
        open_sequences(str(path)).inspect()


@pytest.mark.parametrize("separator", [".", "/"])
def test_missing_chunk_is_not_read_as_zeros(separator: str, tmp_path: Path) -> None:
    path = write_zarr(tmp_path, make_episodes([9, 9]), chunk_rows=7, separator=separator)
    chunk = path / f"data/state/1{separator}0"
    _, rows = transitions_of(path)
    assert (rows.state[7:8] != 0).all()
    reader = open_sequences(str(path))
    assert str(chunk) in reader.source_paths(reader.inspect().files[0])
    chunk.unlink()
    with pytest.raises(DataError, match=r"truncated: .*1 of 3 chunks of data/state are missing"):
        open_sequences(str(path)).inspect()
    _, rows = transitions_of(path, options={"missing_chunks": "fill"})
    assert (rows.state[7:8] == 0).all()


def test_damaged_chunk(tmp_path: Path) -> None:
    path = write_zarr(tmp_path, make_episodes([9, 9]), chunk_rows=7)
    chunk = path / "data/state/1.0"
    chunk.write_bytes(chunk.read_bytes()[:9])
    with pytest.raises(DataError, match=r"truncated, corrupt or of another kind: .*buffer.zarr"):
        transitions_of(path)


def test_changes_of_the_arrays_read_are_noticed_and_only_those(tmp_path: Path) -> None:
    path = write_zarr(tmp_path, make_episodes([9]))
    reader = open_sequences(str(path))
    file = reader.inspect().files[0]
    data = zarr.open_group(str(path), mode="a", zarr_format=2)["data"]
    data.create_array("image", data=np.zeros((9, 8, 8, 3), np.uint8))
    assert reader.inspect().files[0] == file
    assert not any("image" in name for name in reader.source_paths(file))
    assert any(name.endswith("data/state/0.0") for name in reader.source_paths(file))


def test_several_keys(tmp_path: Path) -> None:
    path = write_zarr(tmp_path, make_episodes([4]))
    data = zarr.open_group(str(path), mode="a", zarr_format=2)["data"]
    data.create_array("keypoint", data=np.arange(16.0).reshape(4, 2, 2))
    plan, rows = transitions_of(path, state_keys=["keypoint", "state"])
    assert plan.state_dim == 7
    assert rows.state[1, :4].tolist() == [4, 5, 6, 7]
