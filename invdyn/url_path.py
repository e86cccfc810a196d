"""Files of runs by path or URL, in the words of pathlib: the same lines serve a disk and a storage service."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from invdyn import storage


@dataclass(frozen=True, order=True)
class UrlPath:
    """A file or folder of a storage service, with the part of pathlib's interface that runs use.

    Attributes:
        url: without a slash at its end.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> UrlPath:
        return UrlPath(storage.join(self.url, name))

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return storage.base_name(self.url)

    @property
    def parent(self) -> UrlPath:
        """The folder that this is in."""
        return UrlPath(storage.parent(self.url))

    def resolve(self) -> UrlPath:
        """Return itself: a URL means the same everywhere."""
        return self

    def with_name(self, name: str) -> UrlPath:
        """Return another file in the same folder."""
        return self.parent / name

    def exists(self) -> bool:
        """Return whether a file is here, or a folder that holds one."""
        return storage.exists(self.url)

    def is_file(self) -> bool:
        """Return whether a file is here."""
        return storage.is_file(self.url)

    def is_dir(self) -> bool:
        """Return whether a folder is here that holds a file."""
        return storage.is_folder(self.url)

    def iterdir(self) -> Iterator[UrlPath]:
        """Yield what is in the folder."""
        return (self / name for name in storage.list_names(self.url))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there when something is in it."""

    def read_bytes(self) -> bytes:
        """Return the content of a file."""
        return storage.read_bytes(self.url)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content of a text file."""
        return self.read_bytes().decode(encoding)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(self.url)
        storage.remove([self.url])


AnyPath = Path | UrlPath


def as_path(path: str | Path | UrlPath) -> AnyPath:
    """Return a path to work with.

    Example:
        >>> as_path("s3://bucket/runs/") / "config.yaml"
        UrlPath(url='s3://bucket/runs/config.yaml')
    """
    if isinstance(path, str):
        return UrlPath(path.rstrip("/")) if storage.is_url(path) else Path(path)
    return path


def write_whole(path: AnyPath, content: str | bytes) -> None:
    """Write a file, text in UTF-8, that is whole or as it was.

    Raises:
        OSError: when it cannot be written on a disk.
        StorageError: when a service does not take it.
    """
    data = content.encode() if isinstance(content, str) else content
    if isinstance(path, UrlPath):
        storage.write_bytes(str(path), data)
        return
    with storage.renaming(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing_folder(folder: AnyPath, last: str) -> Iterator[Path]:
    """Give an empty local folder to fill; at the end it becomes `folder`, whole or, on any failure, not at all.

    On this machine it lies beside `folder` and is renamed. A storage service has no folders: its files arrive one by
    one, `last` as the last of them, and whoever reads takes a folder without it for none.

    Raises:
        OSError: when it cannot be written on a disk.
        StorageError: when a service does not take it.
    """
    if isinstance(folder, UrlPath):
        temporary = Path(tempfile.mkdtemp(prefix="invdyn-"))
    else:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        files = sorted((path for path in temporary.iterdir()), key=lambda path: path.name == last)
        if isinstance(folder, UrlPath):
            remove_folder(folder, last)
            for path in files:
                storage.upload(path, str(folder / path.name))
        else:
            for path in files:
                storage.flush(path)
            remove_folder(folder, last)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: AnyPath, first: str) -> None:
    """Remove a folder of files so that it is never seen in part: by its name on a disk, else `first` goes first."""
    if isinstance(folder, UrlPath):
        names = sorted(storage.list_names(str(folder), recursive=True), key=lambda name: name != first)
        storage.remove(str(folder / name) for name in names)
    elif folder.exists():
        hidden = folder.with_name(f".{folder.name}.removed.tmp")
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def remove_tree(folder: AnyPath) -> None:
    """Remove all below a folder, if it is there."""
    if isinstance(folder, UrlPath):
        remove_folder(folder, first="")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def upload_folder(source: Path, target: AnyPath) -> None:
    """Copy all files below a local folder to a storage service.

    Raises:
        StorageError: when a service does not take them.
    """
    for path in sorted(source.rglob("*")):
        if path.is_file() and not path.is_symlink():
            storage.upload(path, str(target / path.relative_to(source).as_posix()))


class GrowingText:
    """A text file that grows line by line.

    A storage service cannot append: there the file is written anew, when `is_due` says so and when it is closed.

    Args:
        path: of the file; what it holds is kept.
        is_due: asked after each piece whether it must be on the service now.
    """

    def __init__(self, path: AnyPath, is_due: Callable[[], bool] = lambda: True):
        self.path, self.is_due = path, is_due
        self.file = path.open("a", encoding="utf-8", newline="", buffering=1) if isinstance(path, Path) else None
        self.text = path.read_text() if isinstance(path, UrlPath) and path.exists() else ""
        self.pending = False

    def write(self, text: str) -> None:
        """Append text.

        Raises:
            OSError: when it cannot be written on a disk.
            StorageError: when a service does not take it.
        """
        if self.file is not None:
            self.file.write(text)
            return
        self.text += text
        self.pending = True
        if self.is_due():
            self.flush()

    def flush(self) -> None:
        """Bring to the service what is not there yet; a disk has it already."""
        if self.pending:
            write_whole(self.path, self.text)
            self.pending = False

    def close(self) -> None:
        """Write what is left."""
        if self.file is not None:
            self.file.close()
        self.flush()
