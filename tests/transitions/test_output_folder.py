"""A finished dataset is replaced by a finished one, whatever happens in between."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from invdyn.errors import DataError
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import Listener, create_dataset
from invdyn.transitions.store import TransitionStore
from tests.transitions.datasets import config_of, contents, record


@pytest.fixture
def old(tmp_path: Path) -> dict[str, bytes]:
    """The files of a finished dataset, which the tests replace."""
    record(tmp_path)
    return contents(create_dataset(dataset(tmp_path, gap=2), local=True).path)


@pytest.fixture
def whole(tmp_path: Path, old: dict[str, bytes]) -> dict[str, bytes]:
    """The files of the dataset that takes its place."""
    return contents(create_dataset(dataset(tmp_path, output_path=str(tmp_path / "whole")), local=True).path)


def dataset(folder: Path, **values: Any) -> DatasetConfig:
    return config_of(folder, part_size_mb=1400 / 2**20, **values)


def finished_files(output: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(output).items() if not name.startswith(".")}


def interrupt(config: DatasetConfig, after: int) -> Path:
    calls = iter(range(1000))

    def stop(rows: int) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_dataset(config, local=True, overwrite=True, listener=Listener(on_rows=stop))
    return Path(config.transitions_path)


@pytest.mark.parametrize("after", [0, 2])
def test_old_dataset_is_there_until_the_new_one_is_whole(
    tmp_path: Path, old: dict[str, bytes], whole: dict[str, bytes], after: int
) -> None:
    output = interrupt(dataset(tmp_path), after)
    assert finished_files(output) == old
    assert TransitionStore(output).gap == 2
    with pytest.raises(DataError, match=r"dataset exists already: .* give --overwrite"):
        create_dataset(dataset(tmp_path), local=True)
    rows: list[int] = []
    create_dataset(dataset(tmp_path), local=True, overwrite=True, listener=Listener(on_rows=rows.append))
    assert (rows[0] > 0) == (after > 0)
    assert contents(output) == whole


def test_old_dataset_survives_bad_data(tmp_path: Path, old: dict[str, bytes]) -> None:
    output = Path(dataset(tmp_path).transitions_path)
    with h5py.File(tmp_path / "sequence/r/shard-00002.hdf5", "a") as file:
        file["data/state"][5] = np.nan
    with pytest.raises(DataError, match=r"must be finite: .*shard-00002"):
        create_dataset(dataset(tmp_path), local=True, overwrite=True)
    assert finished_files(output) == old


def test_another_plan_takes_the_place_of_an_unfinished_one(
    tmp_path: Path, old: dict[str, bytes], whole: dict[str, bytes]
) -> None:
    output = interrupt(dataset(tmp_path, horizon=2), 2)
    rows: list[int] = []
    create_dataset(dataset(tmp_path), local=True, overwrite=True, listener=Listener(on_rows=rows.append))
    assert rows[0] == 0
    assert contents(output) == whole


def test_killed_at_any_moment_of_the_switch(
    tmp_path: Path, old: dict[str, bytes], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps of the switch there is the old dataset, the new one, or one that says it is unfinished."""
    steps = 0
    for stop_at in range(10_000):
        create_dataset(dataset(tmp_path, gap=2), local=True, overwrite=True)
        output = Path(dataset(tmp_path).transitions_path)
        assert contents(output) == old
        with monkeypatch.context() as context:
            stopped = stop_in_switch(context, stop_at)
            with suppress(KeyboardInterrupt):
                create_dataset(dataset(tmp_path), local=True, overwrite=True)
        if not stopped:
            break
        steps += 1
        found = finished_files(output)
        if "manifest.json" in found:
            assert found in (old, whole)
        else:
            with pytest.raises(DataError, match="dataset is unfinished"):
                TransitionStore(output)
        overwrite = "manifest.json" in found
        create_dataset(dataset(tmp_path), local=True, overwrite=overwrite)
        assert contents(output) == whole
    assert steps > len(whole)


def stop_in_switch(context: pytest.MonkeyPatch, stop_at: int) -> list[int]:
    """Interrupt before the step numbered `stop_at` of the switch; return a list that is filled when that happens."""
    stopped: list[int] = []
    started: list[Path] = []
    steps = iter(range(10_000))

    def count(name: str) -> None:
        real = getattr(Path, name)

        def counted(path: Path, *arguments: object, **options: object) -> object:
            # The switch starts when the old manifest goes.
            if path.name == "manifest.json" and name == "unlink" and path.parent.name != ".new":
                started.append(path)
            if started and next(steps) == stop_at:
                stopped.append(stop_at)
                raise KeyboardInterrupt
            return real(path, *arguments, **options)

        context.setattr(Path, name, counted)

    for name in ("unlink", "replace", "rmdir"):
        count(name)
    return stopped
