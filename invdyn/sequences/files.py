"""How recordings are listed and opened: the one place of the readers that touches files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from invdyn.errors import DataError, InvdynError
from invdyn.range_file import RangeFile, hdf5_source
from invdyn.sequences.base import SourceFile
from invdyn.storage import (
    absolute,
    common_version,
    is_file,
    is_folder,
    is_inside,
    is_url,
    join,
    list_names,
    parent,
    relative,
    status,
)

HDF5_SUFFIXES = (".hdf5", ".h5")


def find_folders(path: str, suffix: str) -> list[str]:
    """Return the folders in a folder that end in `suffix`, numbers in numeric order."""
    found = sorted((name for name in list_names(path) if name.endswith(suffix)), key=natural_key)
    return [folder for folder in (join(path, name) for name in found) if is_folder(folder)]


def find_files(path: str, suffixes: tuple[str, ...], *, recursive: bool = False, hidden: bool = False) -> list[str]:
    """Return the file itself, or the files of a folder that end in one of `suffixes`, numbers in numeric order.

    Names that start with a dot are left out unless `hidden`: half-written files have such names.
    """
    if is_file(path):
        return [path]
    names = (name for name in list_names(path, recursive=recursive) if name.endswith(suffixes))
    kept = (name for name in names if hidden or not re.search(r"(^|/)\.", name))
    return [join(path, name) for name in sorted(kept, key=natural_key)]


def natural_key(name: str) -> tuple[tuple[tuple[int, int | str], ...], str]:
    """Return a sort key that puts numbers in numeric order, and equal numbers in the order of their digits.

    Example:
        >>> sorted(["demo_10", "demo_2"], key=natural_key)
        ['demo_2', 'demo_10']
    """
    parts = (part for part in re.split(r"(\d+)", name) if part)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts), name


def source_file(path: str, base: str, parts: tuple[str, ...] = ()) -> SourceFile:
    """Describe a file on disk and the further files that belong to it."""
    return describe(path, base, [path, *parts], parts)


def describe(path: str, base: str, content: list[str], parts: tuple[str, ...] = ()) -> SourceFile:
    """Describe what lies at `path`; its size and version are those of all files `content`."""
    found = [status(name) for name in content]
    return SourceFile(
        path=absolute(path),
        name=relative(path, base if is_inside(path, base) else parent(base)),
        size=sum(file.size for file in found),
        version=common_version([file.version for file in found]),
        parts=tuple(absolute(part) for part in parts),
    )


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading.

    Raises:
        DataError: when there is no such file or it cannot be opened.
    """
    try:
        return io.BufferedReader(RangeFile(path)) if is_url(path) else Path(path).open("rb")
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
    if not is_url(path) and not Path(path).exists():
        raise DataError(f"file not found: {path}")
    # h5py reports damage as these two as well.
    with reading(path, KeyError, ValueError), h5py.File(hdf5_source(path), "r") as file:
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
