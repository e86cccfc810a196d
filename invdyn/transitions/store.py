"""The transition store: part files per split, and a manifest that is written last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int, Num

from invdyn import storage
from invdyn.errors import DataError
from invdyn.range_file import hdf5_source
from invdyn.statistics import Moments
from invdyn.transitions.filters import ConstantDims
from invdyn.transitions.part_file import PartFile
from invdyn.transitions.plan import SPLITS
from invdyn.transitions.windows import Transitions

MANIFEST = "manifest.json"
PROGRESS_FOLDER = ".progress"
NEW_FOLDER = ".new"
CONSTANT_DIMS = "constant_dims"
SCHEMA_VERSION = 1
COLUMN_TYPES: dict[str, np.dtype] = {
    "state": np.dtype(np.float32),
    "action": np.dtype(np.float32),
    "next_state": np.dtype(np.float32),
    "episode": np.dtype(np.int64),
    "step": np.dtype(np.int64),
}
COLUMNS = tuple(COLUMN_TYPES)
BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class Part:
    """One part file: its path in the store, rows, and the hash of its columns' bytes."""

    file: str
    rows: int
    xxh3_128: str


def part_name(split: str, index: int) -> str:
    """Return the path of a part within the store."""
    return f"{split}/part-{index:05d}.h5"


def spread_rows(total: int, count: int) -> Int[np.ndarray, " chosen"]:
    """Return at most `count` evenly spaced indices of `total` rows, the first and the last among them.

    Example:
        >>> spread_rows(10, 4).tolist(), spread_rows(2, 4).tolist()
        ([0, 3, 6, 9], [0, 1])
    """
    return np.linspace(0, max(total - 1, 0), min(total, count)).astype(np.int64)


class TransitionStore:
    """A finished dataset of transitions: a folder, or a URL.

    Attributes:
        path: as it was given.
        manifest: what it is made of.

    Raises:
        DataError: when the folder is missing, unfinished, no dataset, or of another schema version.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        manifest = storage.join(self.path, MANIFEST)
        try:
            values = json.loads(storage.read_text(manifest))
        except FileNotFoundError:
            if not storage.is_folder(self.path):
                raise DataError(f"dataset not found: {path}; make it with experiments/create_dataset.py") from None
            if not {PROGRESS_FOLDER, NEW_FOLDER, *SPLITS}.intersection(storage.list_names(self.path)):
                raise DataError(
                    f"not a dataset: {path} has no {MANIFEST} and no parts; give the folder that "
                    "experiments/create_dataset.py names at its end"
                ) from None
            raise DataError(
                f"dataset is unfinished: {path} has no {MANIFEST}; run experiments/create_dataset.py again to finish it"
            ) from None
        except ValueError as error:
            raise DataError(f"manifest is not valid JSON: {manifest}: {error}; rebuild with --overwrite") from None
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"dataset schema must be version {SCHEMA_VERSION}, {manifest} has {version}; rebuild with --overwrite"
            )
        self.manifest: dict[str, Any] = values

    def __repr__(self) -> str:
        rows = ", ".join(f"{split} {self.num_rows(split):,}" for split in SPLITS)
        return f"TransitionStore({self.path}, rows: {rows})"

    @property
    def state_dim(self) -> int:
        """Numbers in one state."""
        return int(self.manifest["row"]["state_dim"])

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""
        return int(self.manifest["row"]["action_dim"])

    @property
    def history(self) -> int:
        """Past states beside the current one."""
        return int(self.manifest["row"]["history"])

    @property
    def horizon(self) -> int:
        """Actions per row."""
        return int(self.manifest["row"]["horizon"])

    @property
    def gap(self) -> int:
        """Steps from state to next_state."""
        return int(self.manifest["row"]["gap"])

    @property
    def content_hash(self) -> str:
        """Hash over all rows of all splits, from the manifest."""
        return str(self.manifest["content_hash"])

    @property
    def constant_dims(self) -> ConstantDims | None:
        """Dimensions of the recording that are not in the rows, with their values; None when all are."""
        found = self.manifest.get(CONSTANT_DIMS)
        return None if found is None else ConstantDims.model_validate(found)

    @cached_property
    def moments(self) -> Moments:
        """Statistics of the train rows."""
        return Moments.from_json(self.manifest["statistics"])

    def num_rows(self, split: str) -> int:
        """Rows of a split."""
        return sum(part.rows for part in self.parts(split))

    def parts(self, split: str) -> list[Part]:
        """Part files of a split in order.

        Raises:
            DataError: for a name that is not a split.
        """
        if split not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        return [Part(**part) for part in self.manifest["splits"][split]["parts"]]

    def load(self, split: str, *, columns: tuple[str, ...] = COLUMNS) -> dict[str, np.ndarray]:
        """Read a split into memory, each column straight into one array.

        Returns:
            Column name to array of all rows of the split; shapes as in `Transitions`.

        Raises:
            DataError: when a part is missing, corrupt, or does not hold the rows that the manifest says.
        """
        parts = self.parts(split)
        result: dict[str, np.ndarray] = {}
        first = 0
        for part in parts:
            with self._open(part) as file:
                for column in columns:
                    dataset = file[column]
                    if column not in result:
                        result[column] = np.empty((self.num_rows(split), *dataset.shape[1:]), dataset.dtype)
                    if part.rows:
                        dataset.read_direct(result[column], dest_sel=np.s_[first : first + part.rows])
            first += part.rows
        return result or {column: self._empty(column) for column in columns}

    def iter_parts(self, split: str) -> Iterator[Transitions]:
        """Read a split part by part."""
        for part in self.parts(split):
            with self._open(part) as file:
                yield Transitions(**{column: file[column][()] for column in COLUMNS})

    def read_rows(self, part: Part, first: int, stop: int) -> dict[str, np.ndarray]:
        """Read the rows `first` to `stop` of one part: state, action and next_state."""
        with self._open(part) as file:
            return {column: file[column][first:stop] for column in COLUMNS[:3]}

    def take(
        self, split: str, index: Int[np.ndarray, " chosen"], *, columns: tuple[str, ...] = COLUMNS
    ) -> dict[str, np.ndarray]:
        """Read some rows of a split, holding one block of it in memory at a time.

        Args:
            split: which.
            index: (chosen,) rows of the split in rising order.
            columns: which.

        Returns:
            Column name to array of the chosen rows.
        """
        found: dict[str, list[np.ndarray]] = {column: [self._empty(column)] for column in columns}
        start = 0
        for part in self.parts(split):
            inside = index[np.searchsorted(index, start) : np.searchsorted(index, start + part.rows)] - start
            if len(inside):
                with self._open(part) as file:
                    for first in range(int(inside[0]), int(inside[-1]) + 1, BLOCK_ROWS):
                        of_block = inside[(inside >= first) & (inside < first + BLOCK_ROWS)]
                        if len(of_block):
                            stop = int(of_block[-1]) + 1
                            for column in columns:
                                found[column].append(file[column][first:stop][of_block - first])
            start += part.rows
        return {column: np.concatenate(blocks) for column, blocks in found.items()}

    def load_spread(self, split: str, count: int, *, columns: tuple[str, ...] = COLUMNS) -> dict[str, np.ndarray]:
        """Read at most `count` evenly spaced rows of a split, as `take` does."""
        return self.take(split, spread_rows(self.num_rows(split), count), columns=columns)

    def _open(self, part: Part) -> h5py.File:
        path = storage.join(self.path, part.file)
        try:
            file = h5py.File(hdf5_source(path), "r")
        except (OSError, DataError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"part cannot be read: {path}: {reason}; rebuild with --overwrite") from None
        if any(column not in file or len(file[column]) != part.rows for column in COLUMNS):
            file.close()
            raise DataError(
                f"part must hold {part.rows} rows of {', '.join(COLUMNS)}: {path}; rebuild with --overwrite"
            )
        return file

    def _empty(self, column: str) -> Num[np.ndarray, "..."]:
        if column in ("episode", "step"):
            return np.empty(0, np.int64)
        action = (self.action_dim,) if self.horizon == 1 else (self.horizon, self.action_dim)
        shapes = {"state": (self.state_dim * (self.history + 1),), "action": action, "next_state": (self.state_dim,)}
        return np.empty((0, *shapes[column]), np.float32)


@contextmanager
def writing_part(path: str | Path, num_rows: int, row_shapes: Mapping[str, tuple[int, ...]]) -> Iterator[PartFile]:
    """Give a part to fill row by row: it is there whole or not at all.

    Args:
        path: final name.
        num_rows: rows that will be appended.
        row_shapes: shape of one row of state, action and next_state.

    Raises:
        DataError: when the disk is full or the folder cannot be written; no file is left under the final name.
    """
    columns = {name: (row_shapes.get(name, ()), COLUMN_TYPES[name]) for name in COLUMNS}
    with storage.replacing(str(path)) as temporary, PartFile(temporary, num_rows, columns, str(path)) as part:
        yield part
        assert part.rows_written == num_rows, "fewer rows than planned"


def write_json(path: str | Path, values: Any, *, indent: int | None = None) -> None:
    """Write JSON: it is there whole or not at all, also after a power cut.

    Raises:
        DataError: when it cannot be written; an older file of that name is left as it was.
    """
    with storage.replacing(str(path)) as temporary:
        # Far faster than json.dump without an indent.
        temporary.write_text(json.dumps(values, indent=indent), encoding="utf-8")


def holds_rows(path: str, rows: int) -> bool:
    """Return whether a part file is whole: it opens, and every column has this many rows."""
    try:
        with h5py.File(hdf5_source(path), "r") as file:
            return all(column in file and len(file[column]) == rows for column in COLUMNS)
    except (OSError, DataError):
        return False
