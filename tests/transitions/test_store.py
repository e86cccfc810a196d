from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invdyn.errors import DataError
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.part_file import PartFile
from invdyn.transitions.plan import SPLITS
from invdyn.transitions.store import COLUMNS, Part, TransitionStore, write_json, writing_part
from invdyn.transitions.windows import Transitions
from tests.transitions.datasets import config_of, record


@pytest.fixture
def store(tmp_path: Path) -> TransitionStore:
    record(tmp_path)
    return create_dataset(config_of(tmp_path), local=True)


def some_rows(rows: int = 4) -> Transitions:
    values = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    return Transitions(values, values, values, np.arange(rows), np.arange(rows))


def write_part(path: Path, rows: Transitions) -> None:
    columns = {column: getattr(rows, column) for column in COLUMNS}
    with writing_part(path, len(rows), {name: values.shape[1:] for name, values in columns.items()}) as part:
        part.append(columns)


def test_all_ways_to_read_agree(store: TransitionStore) -> None:
    for split in SPLITS:
        whole, parts = store.load(split), list(store.iter_parts(split))
        pieces = [store.read_rows(part, 0, part.rows) for part in store.parts(split)]
        assert len(whole["state"]) == store.num_rows(split) == sum(len(part) for part in parts)
        for column in COLUMNS:
            np.testing.assert_array_equal(whole[column], np.concatenate([getattr(part, column) for part in parts]))
        for column in COLUMNS[:3]:
            np.testing.assert_array_equal(whole[column], np.concatenate([piece[column] for piece in pieces]))
    assert store.load("train", columns=("step",)).keys() == {"step"}
    assert repr(store).endswith("rows: train 78, val 10, test 9)")


@pytest.mark.parametrize("block_rows", [7, 1000])
def test_some_rows_are_those_of_the_whole(
    store: TransitionStore, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("invdyn.transitions.store.BLOCK_ROWS", block_rows)
    whole, total = store.load("train"), store.num_rows("train")
    assert len(store.parts("train")) > 1
    for index in ([], [0], [total - 1], [3, 4, total // 2], range(total)):
        taken = store.take("train", np.array(index, np.int64))
        for column in COLUMNS:
            np.testing.assert_array_equal(taken[column], whole[column][list(index)])
            assert taken[column].dtype == whole[column].dtype
    assert store.take("val", np.arange(1), columns=("step",)).keys() == {"step"}


def test_spread_rows_reach_from_the_first_to_the_last(store: TransitionStore) -> None:
    whole, total = store.load("train"), store.num_rows("train")
    for count in (1, 2, 10, total - 1, total, total + 5):
        index = np.linspace(0, total - 1, min(count, total)).astype(int)
        assert index[-1] == (total - 1 if count > 1 else 0)
        assert len(set(index)) == len(index)
        for name, values in store.load_spread("train", count).items():
            np.testing.assert_array_equal(values, whole[name][index])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest is not valid JSON: .*/manifest\.json: .*rebuild with --overwrite"),
        ("[]", r"schema must be version 1, .*/manifest\.json has None"),
        ('{"schema_version": 99}', r"schema must be version 1, .*/manifest\.json has 99; rebuild with --overwrite"),
    ],
)
def test_manifests_that_cannot_be_used(store: TransitionStore, text: str, message: str) -> None:
    Path(store.path, "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        TransitionStore(store.path)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset not found: .*; make it with experiments/create_dataset\.py"):
        TransitionStore(tmp_path / "nowhere")
    (tmp_path / "shard-00000.hdf5").touch()
    with pytest.raises(DataError, match=r"not a dataset: .* has no manifest\.json and no parts; give the folder that"):
        TransitionStore(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"dataset is unfinished: .* has no manifest\.json; run .* again to finish it"):
        TransitionStore(tmp_path)


def test_unknown_split(store: TransitionStore) -> None:
    with pytest.raises(DataError, match="split must be one of train, val, test, got 'valid'"):
        store.load("valid")


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def shortened(path: Path) -> None:
    path.unlink()
    write_part(path, some_rows(1))


def without_a_column(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["step"]


@pytest.mark.parametrize("damage", [missing, truncated, shortened, without_a_column])
def test_damaged_parts(store: TransitionStore, damage: Any) -> None:
    part = store.parts("train")[1]
    damage(Path(store.path, part.file))
    for read in (store.load, lambda split: list(store.iter_parts(split))):
        with pytest.raises(DataError, match=rf"^part [^\n]*{part.file}[^\n]* rebuild with --overwrite$"):
            read("train")


def test_parts_are_the_bytes_of_their_rows(tmp_path: Path) -> None:
    for name in "ab":
        write_part(tmp_path / name / "part.h5", some_rows())
    assert (tmp_path / "a/part.h5").read_bytes() == (tmp_path / "b/part.h5").read_bytes()


@given(
    row_shapes=st.lists(st.lists(st.integers(0, 5), max_size=2).map(tuple), min_size=1, max_size=9),
    pieces=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from([np.float32, np.float64, np.int64, np.uint8]),
)
def test_files_hold_what_h5py_reads_however_they_were_filled(
    tmp_path_factory: pytest.TempPathFactory, row_shapes: list[tuple[int, ...]], pieces: list[int], dtype: type
) -> None:
    generator = np.random.default_rng(0)
    arrays = {str(i): (generator.normal(size=(sum(pieces), *s)) * 50).astype(dtype) for i, s in enumerate(row_shapes)}
    arrays["transposed"] = np.arange(2.0 * sum(pieces)).reshape(2, -1).T
    columns = {name: (values.shape[1:], values.dtype) for name, values in arrays.items()}
    path = tmp_path_factory.getbasetemp() / "arrays.h5"
    whole = tmp_path_factory.getbasetemp() / "whole.h5"
    with PartFile(path, sum(pieces), columns) as file:
        for stop, rows in zip(np.cumsum(pieces), pieces, strict=True):
            file.append({name: values[stop - rows : stop] for name, values in arrays.items()})
        with PartFile(whole, sum(pieces), columns) as at_once:
            at_once.append(arrays)
            assert at_once.content_hash() == file.content_hash()
    assert path.read_bytes() == whole.read_bytes()
    with h5py.File(path, "r") as read:
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name][()], array)


def test_a_file_that_cannot_grow_is_an_error_that_names_the_part(tmp_path: Path) -> None:
    columns = {"a": ((), np.dtype(np.float64))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DataError, match=r"^cannot write .*part\.h5: .*[Ff]ile too large.*; free some space"):
            PartFile(tmp_path / "temporary", 10_000, columns, str(tmp_path / "part.h5"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    write_part(tmp_path / "a.h5", some_rows(1))
    before = (tmp_path / "a.h5").read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    expected = DataError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"cannot write .*a\.json: .*No space left|^$"):
        write_json(tmp_path / "a.json", {"new": 2})
    with pytest.raises(expected, match=r"cannot write .*a\.h5: .*No space left.*; free some space|^$"):
        write_part(tmp_path / "a.h5", some_rows(2))
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert (tmp_path / "a.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "a.json"]


def test_manifest_names_every_part(store: TransitionStore) -> None:
    named = {part.file for split in SPLITS for part in store.parts(split)}
    assert named == {path.relative_to(store.path).as_posix() for path in Path(store.path).rglob("*.h5")}
    assert all(isinstance(part, Part) and part.rows > 0 for split in SPLITS for part in store.parts(split))
