"""Storage services as file systems of Arrow, which is how Ray takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from invdyn import storage


def for_ray(folder: str) -> tuple[str, FileSystem | None]:
    """Return a folder's path and its file system, as `storage_path` and `storage_filesystem` of Ray take them.

    The file system of a URL is connected to anew wherever it is unpickled, with the endpoint and credentials of this
    process: those of a node may be other ones.
    """
    if not storage.is_url(folder):
        return folder, None
    filesystem, name = storage.connect(folder)
    return name, PyFileSystem(_Handler(filesystem, folder, storage.environment()))


class _Handler(FSSpecHandler):  # type: ignore[misc]
    """Arrow's adapter of an fsspec file system, pickled as where to find it."""

    def __init__(self, filesystem: Any, url: str, environment: Mapping[str, str]):
        super().__init__(filesystem)
        self.url, self.environment = url, environment

    def __reduce__(self) -> tuple[Any, ...]:
        return _connect, (self.url, dict(self.environment))


def _connect(url: str, environment: Mapping[str, str]) -> _Handler:
    storage.set_environment(environment)
    return _Handler(storage.connect(url)[0], url, environment)
