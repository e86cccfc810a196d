"""What extraction is compared with must do the same work: the same rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.store import COLUMNS, TransitionStore
from tests.benchmarks.conftest import Load

STEPS = 20


@pytest.fixture
def extraction(load: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("extraction")
    monkeypatch.setattr(module, "EPISODE_STEPS", STEPS)
    return module


def extracted(source: Path) -> dict[str, np.ndarray]:
    config = DatasetConfig(name="random", buffer_path=str(source), val_ratio=0.0, test_ratio=0.0)
    create_dataset(config, local=True)
    return TransitionStore(config.transitions_path).load("train")


def copied(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        return {name: values[()] for name, values in file.items()}


def test_the_loop_over_steps_gives_the_same_rows(extraction: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "sequence/random"
    rows = extraction.make_recording(source, 0.0, 1)
    found = extraction.step_loop(source, tmp_path / "loop.h5")
    assert found == rows == extraction.LOOP_EPISODES * STEPS
    expected, loop = extracted(source), copied(tmp_path / "loop.h5")
    for name in COLUMNS[:3]:
        np.testing.assert_array_equal(loop[name], expected[name])


def test_the_plain_copy_gives_the_same_rows(extraction: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "sequence/random"
    extraction.make_recording(source, 0.0, 2)
    extraction.plain_copy(source, tmp_path / "copy")
    expected = extracted(source)
    copies = [copied(path) for path in sorted((tmp_path / "copy").iterdir())]
    for name in COLUMNS:
        copy = np.concatenate([columns[name] for columns in copies])
        assert copy.dtype == expected[name].dtype
        np.testing.assert_array_equal(copy, expected[name])


def test_the_recording_has_the_size_asked_for(extraction: ModuleType, tmp_path: Path) -> None:
    rows = extraction.make_recording(tmp_path / "sequence/random", 0.002, 2)
    size = sum(path.stat().st_size for path in (tmp_path / "sequence/random").iterdir())
    assert size == pytest.approx(2e6, rel=0.1)
    assert rows % (2 * STEPS) == 0
