"""Files of a storage service give the bytes that are there, in few requests, and cannot lock up with HDF5."""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invdyn import storage
from invdyn.errors import DataError
from invdyn.range_file import BLOCK_BYTES, DIRECT_BYTES, MAX_AHEAD_BLOCKS, PIECE_BYTES, RangeFile
from invdyn.sequences.registry import open_sequences
from tests.remote import upload
from tests.sequences.recordings import make_episodes, write_recording

SIZE = 5 * BLOCK_BYTES + 100


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def url(content: bytes) -> Iterator[str]:
    filesystem, name = storage.connect("memory://file")
    filesystem.pipe_file(name, content)
    yield "memory://file"
    filesystem.rm_file(name)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the ranges that are asked for."""
    sizes: list[int] = []

    def counting(url: str) -> Any:
        filesystem, name = storage.connect(url)
        if not hasattr(filesystem.cat_ranges, "sizes"):
            fetch = filesystem.cat_ranges

            def cat_ranges(paths: list[str], starts: list[int], stops: list[int], **options: Any) -> Any:
                sizes.extend(stop - start for start, stop in zip(starts, stops, strict=True))
                return fetch(paths, starts, stops, **options)

            cat_ranges.sizes = sizes  # type: ignore[attr-defined]
            monkeypatch.setattr(filesystem, "cat_ranges", cat_ranges)
        return filesystem, name

    monkeypatch.setattr("invdyn.range_file.connect", counting)
    return sizes


@settings(max_examples=60)
@given(reads=st.lists(st.tuples(st.integers(0, SIZE + 10), st.integers(0, 3 * BLOCK_BYTES)), max_size=20))
def test_any_reads_give_the_bytes_that_are_there(content: bytes, reads: list[tuple[int, int]]) -> None:
    filesystem, name = storage.connect("memory://property")
    filesystem.pipe_file(name, content)
    file = RangeFile("memory://property")
    for offset, count in reads:
        assert file.seek(offset) == offset
        assert file.read(count) == content[offset : offset + count]
        assert file.tell() == min(offset + count, max(SIZE, offset))


def test_all_ways_to_move(url: str, content: bytes) -> None:
    file = RangeFile(url)
    assert file.seek(-7, io.SEEK_END) == SIZE - 7
    assert file.read() == content[-7:]
    file.seek(10)
    assert file.seek(5, io.SEEK_CUR) == 15
    assert file.readable()
    assert file.seekable()


def test_large_reads_are_pieces_of_their_own(requests: list[int]) -> None:
    size = 2 * PIECE_BYTES + DIRECT_BYTES
    filesystem, name = storage.connect("memory://large")
    filesystem.pipe_file(name, bytes(size + 10))
    file = RangeFile("memory://large")
    assert file.read(size) == bytes(size)
    assert requests == [PIECE_BYTES, PIECE_BYTES, DIRECT_BYTES]


def test_reading_in_order_asks_for_more_and_more(requests: list[int]) -> None:
    filesystem, name = storage.connect("memory://order")
    filesystem.pipe_file(name, bytes(64 * BLOCK_BYTES))
    file = RangeFile("memory://order")
    while file.read(4096):
        pass
    assert sum(requests) == 64 * BLOCK_BYTES
    assert len(requests) < 10


def test_places_read_in_order_at_the_same_time(requests: list[int]) -> None:
    """As states and actions are, a block of rows after another."""
    filesystem, name = storage.connect("memory://streams")
    filesystem.pipe_file(name, bytes(300 * BLOCK_BYTES))
    file = RangeFile("memory://streams")
    for step in range(60):
        for offset, count in ((0, 3 * BLOCK_BYTES), (200 * BLOCK_BYTES, BLOCK_BYTES)):
            file.seek(offset + step * count)
            assert len(file.read(count)) == count
    assert len(requests) < 30
    assert sum(requests) <= (240 + 2 * MAX_AHEAD_BLOCKS) * BLOCK_BYTES


def test_jumping_about_in_a_small_file_fetches_it_whole(url: str, content: bytes, requests: list[int]) -> None:
    file = RangeFile(url)
    for offset in np.random.default_rng(1).permutation(SIZE - 8)[:200].tolist():
        file.seek(offset)
        assert file.read(8) == content[offset : offset + 8]
    assert len(requests) < 12
    assert sum(requests) <= 3 * SIZE


def test_a_planned_slice_of_hdf5_is_a_few_large_requests(tmp_path: Path, s3_bucket: str, requests: list[int]) -> None:
    episodes = make_episodes([20_000] * 4, state_dim=20, action_dim=5)
    recording = write_recording(tmp_path / "r", episodes)
    reader = open_sequences(upload(recording, f"{s3_bucket}/{tmp_path.name}"))
    plan = reader.inspect()
    assert sum(requests) < 16 * BLOCK_BYTES  # no array is read yet
    requests.clear()
    arrays = reader.read(plan.slice(1, 3))
    wanted = arrays.state.nbytes + arrays.action.nbytes
    assert wanted > 7 * 2**20
    assert len(requests) <= 10
    assert sum(requests) <= wanted + 3 * 2**20


def test_missing_changed_and_lost_files(url: str, content: bytes) -> None:
    with pytest.raises(DataError, match="file not found: memory://nothing"):
        RangeFile("memory://nothing")
    filesystem, name = storage.connect(url)
    file = RangeFile(url)
    filesystem.pipe_file(name, content[:50])
    with pytest.raises(DataError, match="file changed while it was read: memory://file"):
        file.read(100)
    filesystem.rm_file(name)
    with pytest.raises(DataError, match="file not found: memory://file; it was there when it was opened"):
        file.read(100)
    filesystem.pipe_file(name, content)


def test_no_garbage_is_collected_while_hdf5_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """h5py's lock is held while it waits for bytes: a collection of an h5py object elsewhere would wait for ever."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.arange(200_000.0)
    filesystem, _ = storage.connect(upload(tmp_path / "x.h5", "memory://x.h5"))
    fetch = type(filesystem).cat_ranges
    collected: list[bool] = []

    def cat_ranges(*arguments: Any, **options: Any) -> Any:
        def make_garbage() -> None:
            collections = gc.get_stats()[0]["collections"]
            rings = [[] for _ in range(5000)]
            for ring in rings:
                ring.append(ring)
            collected.append(gc.get_stats()[0]["collections"] > collections)

        other = threading.Thread(target=make_garbage)
        other.start()
        other.join()
        return fetch(filesystem, *arguments, **options)

    monkeypatch.setattr(filesystem, "cat_ranges", cat_ranges, raising=False)
    assert gc.isenabled()
    with h5py.File(RangeFile("memory://x.h5"), "r") as file:
        np.testing.assert_array_equal(file["x"][:], np.arange(200_000.0))
    assert collected
    assert not any(collected)
    assert gc.isenabled()
