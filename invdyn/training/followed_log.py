"""The log of a run that is written elsewhere on the cluster, shown here as it grows."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from pathlib import Path

from invdyn.errors import StorageError
from invdyn.url_path import AnyPath

INTERVAL_S = 0.5
URL_INTERVAL_S = 3.0


class FollowedLog:
    """Prints, as long as it is entered, what is appended to a file; not what it held before.

    Args:
        path: of the file, which need not exist yet.
    """

    def __init__(self, path: AnyPath):
        self.path = path
        self.interval_s = INTERVAL_S if isinstance(path, Path) else URL_INTERVAL_S
        self.position = 0
        self.position += len(self._read_new())
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._print_new()

    def _follow(self) -> None:
        while not self.stopped.wait(self.interval_s):
            self._print_new()

    def _print_new(self) -> None:
        new = self._read_new()
        self.position += len(new)
        sys.stdout.write(new.decode("utf-8", errors="replace"))
        sys.stdout.flush()

    def _read_new(self) -> bytes:
        with suppress(FileNotFoundError, StorageError):  # not there yet; or asked again later
            if not isinstance(self.path, Path):
                return self.path.read_bytes()[self.position :]
            with self.path.open("rb") as file:
                file.seek(self.position)
                return file.read()
        return b""
