"""How recordings are listed and opened: the one place that touches the file system."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import h5py

from invdyn.errors import DataError, InvdynError
from invdyn.sequences.base import SourceFile

HDF5_SUFFIXES = (".hdf5", ".h5")


def exists(path: str) -> bool:
    """Return whether a file or a folder is at `path`."""
    return Path(path).exists()


def is_folder(path: str) -> bool:
    """Return whether `path` is a folder."""
    return Path(path).is_dir()


def join(folder: str, *names: str) -> str:
    """Return the path of something inside a folder."""
    return str(Path(folder, *names))


def parent(path: str) -> str:
    """Return the folder that something is in."""
    return str(Path(path).parent)


def relative(path: str, folder: str) -> str:
    """Return a path relative to a folder above it, with forward slashes."""
    return Path(path).relative_to(folder).as_posix()


def find_folders(path: str, suffix: str) -> list[str]:
    """Return the folders in a folder that end in `suffix`, numbers in numeric order."""
    names = (p.name for p in Path(path).glob(f"*{suffix}") if p.is_dir())
    return [join(path, name) for name in sorted(names, key=natural_key)]


def find_files(path: str, suffixes: tuple[str, ...], *, recursive: bool = False, hidden: bool = False) -> list[str]:
    """Return the file itself, or the files of a folder that end in one of `suffixes`, numbers in numeric order.

    Names that start with a dot are left out unless `hidden`: half-written files have such names.
    """
    root = Path(path)
    if root.is_file():
        return [path]
    found = root.rglob("*") if recursive else root.glob("*")
    names = [p.relative_to(root).as_posix() for p in found if p.name.endswith(suffixes)]
    kept = (name for name in names if hidden or not re.search(r"(^|/)\.", name))
    return [join(path, name) for name in sorted(kept, key=natural_key)]


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts numbers in numeric order.

    Example:
        >>> sorted(["demo_10", "demo_2"], key=natural_key)
        ['demo_2', 'demo_10']
    """
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)


def source_file(path: str, base: str, parts: tuple[str, ...] = ()) -> SourceFile:
    """Describe a file on disk and the further files that belong to it."""
    return describe(path, base, [path, *parts], parts)


def describe(path: str, base: str, content: list[str], parts: tuple[str, ...] = ()) -> SourceFile:
    """Describe what lies at `path`; its size is the sum over the files `content`, its time the newest."""
    stats = [Path(name).stat() for name in content]
    root = Path(base) if is_folder(base) else Path(base).parent
    name = Path(path).relative_to(root).as_posix()
    return SourceFile(
        path=str(Path(path).resolve()),
        name=Path(path).name if name == "." else name,
        size=sum(stat.st_size for stat in stats),
        mtime_ns=max((stat.st_mtime_ns for stat in stats), default=0),
        parts=tuple(str(Path(part).resolve()) for part in parts),
    )


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading.

    Raises:
        DataError: when there is no such file or it cannot be opened.
    """
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise DataError(f"file not found: {path}") from None
    except OSError as error:
        raise unreadable(path, error) from None


@contextmanager
def open_hdf5(path: str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, and turn whatever HDF5 says about damage into a `DataError`.

    Raises:
        DataError: when the file is missing, truncated, corrupt or not HDF5.
    """
    if not Path(path).exists():
        raise DataError(f"file not found: {path}")
    with reading(path, KeyError, ValueError), h5py.File(path, "r") as file:  # h5py reports damage as these too
        yield file


@contextmanager
def reading(path: str, *more: type[Exception]) -> Iterator[None]:
    """Turn an OSError, and the further exception types given, into the error for an unreadable file.

    Raises:
        DataError: naming the file and the reason.
    """
    try:
        yield
    except InvdynError:
        raise
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from None
    except more as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: Exception) -> DataError:
    """Return the error for a file that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"file is truncated, corrupt or of another kind: {path}: {reason}; copy or record it again")


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: when the file is missing or not a JSON object.
    """
    return _parse_json(_read_text(path), path)


def read_json_lines(path: str) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line.

    Raises:
        DataError: when the file is missing or a line is not a JSON object.
    """
    return [_parse_json(line, path) for line in _read_text(path).splitlines() if line.strip()]


def require_package(name: str, format_name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        DataError: when it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"reading {format_name} recordings needs the package {name!r}: {error}; install it with: pip install {name}"
        ) from None


def _read_text(path: str) -> str:
    with open_binary(path) as file, reading(path, UnicodeDecodeError):
        return file.read().decode("utf-8")


def _parse_json(text: str, path: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"file must be JSON: {path}: {error}; copy or record it again") from None
    if not isinstance(values, dict):
        raise DataError(f"file must hold a JSON object: {path}: found {type(values).__name__}")
    return values
