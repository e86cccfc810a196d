"""Recordings of very many small files: right, shared out among the tasks, and read once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from invdyn.sequences.native import NativeReader
from invdyn.transitions.extract import Listener, create_dataset
from invdyn.transitions.plan import MAX_FILES, SPLITS, ExtractionPlan
from tests.sequences import writers
from tests.sequences.recordings import make_episodes, write_recording
from tests.transitions.datasets import config_of


def check(folder: Path, num_files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a dataset of files of one short episode each, and compare all of its rows."""
    episodes = make_episodes([3] * num_files)
    write_recording(folder / "sequence/r", episodes, episodes_per_shard=1)
    inspected: list[str] = []
    inspect = NativeReader.inspect_file
    monkeypatch.setattr(
        NativeReader, "inspect_file", lambda self, path: (inspected.append(path), inspect(self, path))[1]
    )
    plans: list[ExtractionPlan] = []
    config = config_of(folder, part_size_mb=64.0)
    store = create_dataset(config, local=True, listener=Listener(on_plan=plans.append))
    assert len(inspected) == num_files
    assert len(plans[0].segments) == -(-num_files // MAX_FILES)
    assert max(len(segment.sequences.files) for segment in plans[0].segments) <= MAX_FILES
    assert [source["name"] for source in store.manifest["sources"]] == [f"shard-{i:05d}.hdf5" for i in range(num_files)]
    rows = {split: store.load(split) for split in SPLITS}
    episode = np.concatenate([rows[split]["episode"] for split in SPLITS])
    state = np.concatenate([rows[split]["state"] for split in SPLITS])
    order = np.argsort(episode, kind="stable")
    assert episode[order].tolist() == np.repeat(np.arange(num_files), 3).tolist()
    expected = np.concatenate([states[:3] for states, _ in episodes]).astype(np.float32)
    np.testing.assert_array_equal(state[order], expected)


def test_hundreds_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, 300, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, 10_000, monkeypatch)


def test_hundreds_of_parquet_files(tmp_path: Path) -> None:
    writers.write_lerobot_v2(tmp_path / "sequence/r", writers.make_episodes([4] * 300))
    store = create_dataset(config_of(tmp_path, part_size_mb=64.0), local=True)
    assert store.manifest["num_rows"] == 300 * 3
    assert len(store.manifest["sources"]) == 300
    assert len(store.parts("train")) == 2
