"""Writing arrays as an HDF5 file without letting HDF5 touch the disk.

An HDF5 file whose disk fills up while it is open cannot be closed, and the process crashes when it ends. So HDF5 lays
the file out in memory, without the arrays, which are then written to their places as plain bytes: as fast as HDF5, and
a full disk is an `OSError` like any other.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Shaped

Array = Shaped[np.ndarray, "..."]


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an HDF5 file with one dataset per array: the same arrays give the same bytes.

    Raises:
        OSError: when the disk is full or the file cannot be written.
    """
    layout = _Layout()
    places: list[tuple[int, memoryview]] = []
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(layout, "w") as file:
        for name, array in arrays.items():
            dataset = file.create_dataset(name, array.shape, array.dtype, track_times=False, dcpl=early)
            if array.size:
                places.append((dataset.id.get_offset(), np.ascontiguousarray(array).data.cast("B")))
    pieces: list[tuple[int, bytes | memoryview]] = [*layout.written.items(), *places]
    with path.open("wb") as disk:
        for offset, content in pieces:
            disk.seek(offset)
            disk.write(content)
        disk.truncate(layout.size)


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
