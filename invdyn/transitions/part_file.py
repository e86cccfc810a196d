"""Writing an HDF5 file piece by piece without letting HDF5 touch the disk.

An HDF5 file whose disk fills up while it is open cannot be closed, and the process crashes when it ends. So HDF5 lays
the file out in memory, without the values, which are then written to their places as plain bytes: as fast as HDF5, in
pieces that stay in a core's cache, and a full disk is an error like any other.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import xxhash
from jaxtyping import Shaped

from invdyn.storage import writing_to

Array = Shaped[np.ndarray, "rows ..."]
Column = tuple[tuple[int, ...], np.dtype]


class PartFile:
    """A new HDF5 file with one dataset per column, filled from its first row to its last: same rows, same bytes.

    Args:
        path: the file.
        num_rows: rows of every column.
        columns: name to (shape of one row, dtype).
        final_path: what errors call it.

    Raises:
        DataError: when the disk is full or the file cannot be written; `append` does too.
    """

    def __init__(self, path: Path, num_rows: int, columns: Mapping[str, Column], final_path: str | None = None):
        self.num_rows = num_rows
        self.final_path = final_path or str(path)
        self.rows_written = 0
        self._columns = dict(columns)
        self._hashes = {name: xxhash.xxh3_128() for name in columns}
        layout, self._offsets = _lay_out(num_rows, columns)
        with writing_to(self.final_path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with writing_to(self.final_path):
                os.ftruncate(self._file, layout.size)
                for offset, content in layout.written.items():
                    _write(self._file, content, offset)
        except BaseException:
            self.close()
            raise

    def append(self, columns: Mapping[str, Array]) -> None:
        """Write the next rows of all columns."""
        (num_new,) = {len(values) for values in columns.values()}
        assert self.rows_written + num_new <= self.num_rows, "more rows than the file was laid out for"
        for name, (shape, dtype) in self._columns.items():
            values = np.ascontiguousarray(columns[name])
            assert (values.dtype, values.shape[1:]) == (dtype, tuple(shape))
            if values.size:
                content = values.data.cast("B")
                self._hashes[name].update(content)
                row_bytes = len(content) // num_new
                with writing_to(self.final_path):
                    _write(self._file, content, self._offsets[name] + self.rows_written * row_bytes)
        self.rows_written += num_new

    def content_hash(self) -> str:
        """Return the XXH3-128 of the columns' hashes, each over the bytes of its rows."""
        digest = xxhash.xxh3_128()
        for each in self._hashes.values():
            digest.update(each.digest())
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def _lay_out(num_rows: int, columns: Mapping[str, Column]) -> tuple[_Layout, dict[str, int]]:
    """Return the file without its values, and where those of each column start."""
    layout = _Layout()
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    offsets = {}
    with h5py.File(layout, "w") as file:
        for name, (shape, dtype) in columns.items():
            dataset = file.create_dataset(name, (num_rows, *shape), dtype, track_times=False, dcpl=early)
            offsets[name] = dataset.id.get_offset() if dataset.size else 0
    return layout, offsets


def _write(file: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:  # a write may be cut short by a signal, or at 2 GB
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


class _Layout(io.RawIOBase):
    """A file that remembers what was written where, and has no room for the gaps between.

    Attributes:
        written: offset to bytes.
        size: length of the file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, bytes] = {}
        self.size = 0
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the start, the position or the end."""
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence] + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def write(self, content: Any) -> int:
        """Remember some bytes; a later write at the same offset takes the place of an earlier one."""
        self.written.pop(self._position, None)  # the order of the writes decides where they overlap
        self.written[self._position] = bytes(content)
        self._position += len(content)
        self.size = max(self.size, self._position)
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file."""
        self.size = self._position if size is None else size
        return self.size
