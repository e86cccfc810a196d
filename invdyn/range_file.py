"""A file of a storage service, read by ranges: few large requests where HDF5, zip and Parquet ask for many small ones.

Large reads go to the service as they are, in pieces that are fetched at the same time. Small ones are answered from
blocks, of which more and more are fetched at once while they are read in order.
"""

from __future__ import annotations

import gc
import io
import threading
from collections import OrderedDict
from typing import Any

from invdyn.errors import DataError
from invdyn.storage import connect, explained, is_url

BLOCK_BYTES = 256 * 2**10
MAX_AHEAD_BLOCKS = 16
MAX_STREAMS = 8
"""Places that are read in order at the same time, such as one for states and one for actions."""
CACHED_BLOCKS = 256
MAX_JUMPS = 8
"""Small reads out of order after which a file that fits among the blocks is fetched whole."""
DIRECT_BYTES = 4 * 2**20
PIECE_BYTES = 8 * 2**20
PIECES_AT_A_TIME = 8


class RangeFile(io.RawIOBase):
    """Reads one file by its URL.

    Raises:
        DataError: when there is none.
        StorageError: when the service refuses or does not answer.
    """

    def __init__(self, url: str):
        super().__init__()
        self.url = url
        try:
            with explained(url):
                self._filesystem, self._name = connect(url)
                self.size = int(self._filesystem.info(self._name)["size"] or 0)
        except FileNotFoundError:
            raise DataError(f"file not found: {url}") from None
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._streams: OrderedDict[int, int] = OrderedDict({0: 1})  # next block of each, to blocks fetched last
        self._num_jumps = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the start, the position or the end."""
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, except at the end of the file; return the number of bytes."""
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self.size - self._position), 0)
        (self._read_directly if count >= DIRECT_BYTES else self._read_blocks)(view[:count])
        self._position += count
        return count

    def _read_directly(self, view: memoryview) -> None:
        for first in range(0, len(view), PIECE_BYTES * PIECES_AT_A_TIME):
            batch = view[first : first + PIECE_BYTES * PIECES_AT_A_TIME]
            start = self._position + first
            filled = 0
            for piece in self._fetch(start, start + len(batch)):
                batch[filled : filled + len(piece)] = piece
                filled += len(piece)

    def _read_blocks(self, view: memoryview) -> None:
        last = (self._position + len(view) - 1) // BLOCK_BYTES
        filled = 0
        while filled < len(view):
            index, offset = divmod(self._position + filled, BLOCK_BYTES)
            piece = self._block(index, last)[offset : offset + len(view) - filled]
            view[filled : filled + len(piece)] = piece
            filled += len(piece)

    def _block(self, index: int, last: int) -> bytes:
        """Return a block; when it is missing, fetch it with those up to `last` and more."""
        if index in self._blocks:
            self._blocks.move_to_end(index)
            return self._blocks[index]
        start, stop = self._wanted(index, last)
        data = b"".join(self._fetch(start, stop))
        for first in range(start, stop, BLOCK_BYTES):
            number = first // BLOCK_BYTES
            self._blocks[number] = data[first - start : first - start + BLOCK_BYTES]
            self._blocks.move_to_end(number)
        self._blocks.move_to_end(index)
        while len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[index]

    def _wanted(self, index: int, last: int) -> tuple[int, int]:
        """Return from where to where to fetch, now that a block is missing: more than it, if past reads say so."""
        before = self._streams.pop(index, None)
        if before is None:
            self._num_jumps += 1
        if self._num_jumps > MAX_JUMPS and self.size <= CACHED_BLOCKS * BLOCK_BYTES:
            return 0, self.size
        ahead = max(last + 1 - index, 1 if before is None else min(2 * before, MAX_AHEAD_BLOCKS))
        self._streams[index + ahead] = ahead
        if len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        return index * BLOCK_BYTES, min((index + ahead) * BLOCK_BYTES, self.size)

    def _fetch(self, start: int, stop: int) -> list[bytes]:
        """Return the bytes `start` to `stop` in pieces, fetched at the same time."""
        starts = list(range(start, stop, PIECE_BYTES))
        stops = [*starts[1:], stop]
        try:
            with explained(self.url), _collection_pause:
                found = self._filesystem.cat_ranges([self._name] * len(starts), starts, stops, on_error="raise")
        except FileNotFoundError:
            raise DataError(f"file not found: {self.url}; it was there when it was opened") from None
        if sum(map(len, found)) != stop - start:
            raise DataError(f"file changed while it was read: {self.url}; run the command again")
        return [bytes(piece) for piece in found]


def hdf5_source(path: str) -> RangeFile | str:
    """Return what h5py is to open: a path of this machine as it is, a URL as a `RangeFile`."""
    return RangeFile(path) if is_url(path) else path


class _CollectionPause:
    """Keeps Python from collecting garbage while another thread fetches.

    HDF5 holds h5py's global lock while it waits for us. A collection in the fetching thread that meets an h5py object
    would wait for that lock, for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._num_waiting == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._num_waiting += 1

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._num_waiting -= 1
            if self._num_waiting == 0 and self._was_enabled:
                gc.enable()


_collection_pause = _CollectionPause()
