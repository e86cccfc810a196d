"""OGBench: flat arrays in an .npz file, where `terminals` marks the last state of a trajectory.

The action of that row means nothing, and nothing follows it: valid transitions start at the other rows.
`<name>-val.npz` beside `<name>.npz` is the validation split.
"""

from __future__ import annotations

import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from jaxtyping import Num

from invdyn import storage
from invdyn.errors import DataError
from invdyn.sequences.base import GIVEN_SPLITS, EpisodeArrays, SequencePlan
from invdyn.sequences.boundaries import runs_between
from invdyn.sequences.file_reader import FileReader, changed, plan_file
from invdyn.sequences.files import find_files, open_binary, reading, source_file
from invdyn.sequences.hdf5 import check_flags, check_numeric, check_rows, describe_keys, flat_rows, side_by_side, width

SUFFIX = ".npz"
VALIDATION_SUFFIX = "-val.npz"
OBSERVATIONS = "observations"
TERMINALS = "terminals"
LAST_STATE_ROW = "action_of_last_state"
SKIP_BYTES = 8 * 2**20
LOCAL_HEADER_BYTES = 30
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError)


class OgbenchReader(FileReader):
    """Reads an OGBench file and its validation file, or a folder of such files.

    Args:
        path: file or folder.
        state_keys: arrays that make the state, such as `observations` or `qpos`.
        action_key: array of the actions.
        on_error: `fail` or `skip`.
    """

    format_name = "ogbench"
    default_state_keys = (OBSERVATIONS,)
    _gives_split = False

    @classmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether there are .npz files."""
        return bool(find_files(str(path), (SUFFIX,))) if storage.is_folder(str(path)) else str(path).endswith(SUFFIX)

    def find(self) -> list[str]:
        """Return the .npz files: of a folder all, of a file itself and its validation file."""
        if storage.is_folder(self.path) or self.path.endswith(VALIDATION_SUFFIX):
            return find_files(self.path, (SUFFIX,))
        validation = self.path.removesuffix(SUFFIX) + VALIDATION_SUFFIX
        return [self.path, validation] if storage.exists(validation) else [self.path]

    def inspect(self, without: Mapping[str, str] | None = None) -> SequencePlan:
        """Inspect the files; only with a validation file does the recording give splits."""
        self._gives_split = storage.exists(self.path) and any(path.endswith(VALIDATION_SUFFIX) for path in self.find())
        return super().inspect(without)

    def inspect_file(self, path: str) -> SequencePlan:
        """Read the headers of the arrays, and `terminals`."""
        with open_npz(path) as archive:
            arrays = {key: archive.header(key) for key in (*self.state_keys, self.action_key, TERMINALS)}
            check_flags(arrays[TERMINALS].shape, TERMINALS, path)
            check_rows({key: array.shape[0] for key, array in arrays.items()}, path)
            total = arrays[TERMINALS].shape[0]
            ends = archive.read(TERMINALS, 0, total).reshape(-1) != 0
            if not total:
                raise DataError(f"a recording must hold at least one episode: {path}: its arrays have 0 rows")
        first_row, num_states = runs_between(ends)
        marked = ends[first_row + num_states - 1]
        split = GIVEN_SPLITS.index("val" if path.endswith(VALIDATION_SUFFIX) else "train")
        return plan_file(
            source_file(path, self.path),
            num_states=num_states,
            num_actions=num_states - marked,
            dims=(sum(width(arrays[key].shape) for key in self.state_keys), width(arrays[self.action_key].shape)),
            first_row=first_row,
            given_split=np.full(len(first_row), split) if self._gives_split else None,
            drops={LAST_STATE_ROW: int(marked.sum())},
        )

    def read(self, plan: SequencePlan) -> EpisodeArrays:
        """Read each array of the planned rows in one slice, and leave out the actions that mean nothing."""
        source = plan.files[plan.file_index[0]]
        path = source.path
        assert plan.first_row is not None
        first, count = int(plan.first_row[0]), int(plan.num_states.sum())
        archive = self.keep(source, lambda: _open_while_used(path))
        with reading(path, *DAMAGE):
            if min(archive.header(key).shape[0] for key in (*self.state_keys, self.action_key)) < first + count:
                raise changed(path)
            states = [flat_rows(archive.read(key, first, count)) for key in self.state_keys]
            actions = flat_rows(archive.read(self.action_key, first, count))
        means_something = np.ones(count, dtype=bool)
        means_something[(np.cumsum(plan.num_states) - 1)[plan.num_actions < plan.num_states]] = False
        return EpisodeArrays(side_by_side(states), actions[means_something])


@dataclass(frozen=True)
class ArrayHeader:
    """Shape and type of an array in an .npz file, and the size of the header before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    size: int


class NpzArchive:
    """Reads slices of the arrays of an .npz file without reading them whole.

    What is compressed can only be read from its start on: a slice behind the one before goes on where that ended.
    """

    def __init__(self, path: str, file: BinaryIO, archive: zipfile.ZipFile):
        self.path = path
        self._file = file
        self._archive = archive
        self._headers: dict[str, ArrayHeader] = {}
        self._members: dict[str, tuple[IO[bytes], int]] = {}  # compressed arrays that are open, and the bytes read

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all arrays."""
        names = [name.removesuffix(".npy") for name in self._archive.namelist() if name.endswith(".npy")]
        return {name: self._header(name).shape for name in names}

    def header(self, key: str) -> ArrayHeader:
        """Return the header of an array.

        Raises:
            DataError: when the array is missing, not numeric or a scalar.
        """
        if f"{key}.npy" not in self._archive.NameToInfo:
            raise DataError(
                f"key {key!r} is missing: {self.path}: found {describe_keys(self.shapes())}; set shape_meta.obs and "
                "shape_meta.action_key to keys of the recording"
            )
        header = self._headers.get(key) or self._headers.setdefault(key, self._header(key))
        check_numeric(header.dtype, header.shape, key, self.path)
        return header

    def read(self, key: str, first: int, count: int) -> np.ndarray:
        """Return `count` rows from row `first` on."""
        header = self.header(key)
        if header.fortran_order and len(header.shape) > 1:
            values = self._values(key, header, 0, header.shape[0]).reshape(header.shape[::-1])
            return np.ascontiguousarray(values.T[first : first + count])
        return self._values(key, header, first, count).reshape(-1, *header.shape[1:])

    def _header(self, key: str) -> ArrayHeader:
        with self._archive.open(f"{key}.npy") as member:
            version = np.lib.format.read_magic(member)
            if version[0] > 2:
                raise DataError(f"{key} must be numeric: {self.path}: it is stored as .npy version {version[0]}")
            read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(member)
            return ArrayHeader(shape, dtype, fortran_order, member.tell())

    def _values(self, key: str, header: ArrayHeader, first: int, count: int) -> np.ndarray:
        row_bytes = width(header.shape) * header.dtype.itemsize
        values = np.empty(count * row_bytes, dtype=np.uint8)
        info = self._archive.getinfo(f"{key}.npy")
        offset = header.size + first * row_bytes
        if info.compress_type == zipfile.ZIP_STORED:
            _fill(self._at(info, offset), values)
            return values.view(header.dtype)
        member, position = self._members.pop(key, (None, 0))
        if member is None or position > offset:
            member, position = self._archive.open(info), 0
        _skip(member, offset - position)
        _fill(member, values)
        self._members[key] = member, offset + len(values)
        return values.view(header.dtype)

    def _at(self, info: zipfile.ZipInfo, offset: int) -> BinaryIO:
        """Return the file at a byte of an array that is stored without compression."""
        self._file.seek(info.header_offset)
        local = self._file.read(LOCAL_HEADER_BYTES)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        self._file.seek(info.header_offset + LOCAL_HEADER_BYTES + names + offset)
        return self._file


@contextmanager
def open_npz(path: str) -> Iterator[NpzArchive]:
    """Open an .npz file.

    Raises:
        DataError: when it is missing, truncated, corrupt or not an .npz file.
    """
    with reading(path, *DAMAGE), open_binary(path) as file, zipfile.ZipFile(file) as archive:
        yield NpzArchive(path, file, archive)


def _open_while_used(path: str) -> NpzArchive:
    """Open an .npz file; it is closed when nothing holds it any more."""
    stack = ExitStack()
    archive = stack.enter_context(open_npz(path))
    weakref.finalize(archive, stack.close)
    return archive


def _skip(member: IO[bytes], count: int) -> None:
    while count > 0:
        passed = len(member.read(min(count, SKIP_BYTES)))
        if not passed:
            raise EOFError("the array ends before its last row")
        count -= passed


def _fill(source: IO[bytes], values: Num[np.ndarray, "bytes"]) -> None:
    view = memoryview(values)  # type: ignore[arg-type]
    while view:
        count = source.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the array ends before its last row")
        view = view[count:]
