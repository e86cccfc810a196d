"""Columns of vectors in Parquet files: their widths without reading them, their rows as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Num

from invdyn.errors import DataError
from invdyn.sequences.files import open_binary, reading

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet


@contextmanager
def open_parquet(path: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a Parquet file.

    Raises:
        DataError: when it is missing, truncated, corrupt or not Parquet.
    """
    import pyarrow
    from pyarrow import parquet

    damage = (pyarrow.ArrowException, UnicodeDecodeError)  # a name in a damaged footer
    with reading(path, *damage), open_binary(path) as source, parquet.ParquetFile(source) as file:
        yield file


def column_types(file: pyarrow.parquet.ParquetFile) -> dict[str, Any]:
    """Return the arrow type of every column."""
    return {field.name: field.type for field in file.schema_arrow}


def describe_columns(file: pyarrow.parquet.ParquetFile) -> str:
    """Return the columns and their types, as an error lists them."""
    return ", ".join(f"{name} {type_}" for name, type_ in column_types(file).items()) or "no columns"


def column_width(file: pyarrow.parquet.ParquetFile, name: str, path: str) -> int:
    """Return the numbers per row of a column, from the counts in the file's footer.

    Raises:
        DataError: when the column is missing, not numeric, or its rows differ in length.
    """
    types = column_types(file)
    if name not in types:
        raise DataError(
            f"key {name!r} is missing: {path}: found {describe_columns(file)}; set shape_meta.obs and "
            "shape_meta.action_key to columns of the recording"
        )
    if not is_numeric(types[name]):
        raise DataError(f"{name} must be numeric: {path}: it is {types[name]}; choose other keys in shape_meta")
    leaf = sum(_num_leaves(type_) for type_ in list(types.values())[: list(types).index(name)])
    widths = set()
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        if group.num_rows:
            widths.add(group.column(leaf).num_values / group.num_rows)
    if len(widths) > 1 or any(width != int(width) for width in widths):
        raise DataError(f"lengths disagree: {path}: rows of {name} hold {sorted(widths)} numbers on average")
    return int(widths.pop()) if widths else 0


LastGroup = dict[tuple[str, int], "pyarrow.Table"]
"""The row group that was read last, by its file and number: a row group cannot be read in part."""


def read_rows(
    file: pyarrow.parquet.ParquetFile, names: list[str], first: int, stop: int, path: str, last: LastGroup
) -> dict[str, Num[np.ndarray, "rows dim"]]:
    """Read rows `first` to `stop` (exclusive) of some columns, from the row groups that hold them.

    Args:
        file: the file, open.
        names: the columns.
        first: first row.
        stop: row after the last.
        path: the file's path.
        last: the row group that the read before left, of the same columns; this one leaves its own.

    Raises:
        DataError: when rows of a column differ in length.
    """
    import pyarrow

    sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    ends = np.cumsum(sizes)
    wanted = np.flatnonzero((ends > first) & (ends - sizes < stop)).tolist()
    before = int(ends[wanted[0]] - sizes[wanted[0]])
    tables = [last[path, wanted[0]]] if (path, wanted[0]) in last else []
    unread = wanted[len(tables) :]
    if len(unread) > 1:
        tables.append(file.read_row_groups(unread[:-1], columns=names))
    if unread:
        last.clear()
        last[path, unread[-1]] = file.read_row_groups(unread[-1:], columns=names)
        tables.append(last[path, unread[-1]])
    table = pyarrow.concat_tables(tables).slice(first - before, stop - first)
    return {name: _rows(table.column(name), name, f"{path}: rows {first} to {stop}") for name in names}


def read_numbers(file: pyarrow.parquet.ParquetFile, names: list[str]) -> dict[str, np.ndarray]:
    """Read whole columns of single numbers."""
    table = file.read(columns=names)
    return {name: table.column(name).to_numpy() for name in names}


def is_numeric(type_: Any) -> bool:
    """Return whether a column of this arrow type holds numbers, flags, or lists of them."""
    import pyarrow

    types = pyarrow.types
    if _is_list(type_):
        return is_numeric(type_.value_type)
    return bool(types.is_integer(type_) or types.is_floating(type_) or types.is_boolean(type_))


def _is_list(type_: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_))


def _num_leaves(type_: Any) -> int:
    """Return how many columns of the file a column of this type takes."""
    import pyarrow

    if _is_list(type_):
        return _num_leaves(type_.value_type)
    if pyarrow.types.is_map(type_):
        return _num_leaves(type_.key_type) + _num_leaves(type_.item_type)
    if pyarrow.types.is_struct(type_):
        return sum(_num_leaves(type_.field(index).type) for index in range(type_.num_fields))
    return 1


def _rows(column: pyarrow.ChunkedArray, name: str, where: str) -> Num[np.ndarray, "rows dim"]:
    chunks = [_chunk_rows(chunk, name, where) for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.zeros((0, 0), dtype=np.float32)
    if len({chunk.shape[1] for chunk in chunks}) > 1:
        raise DataError(f"lengths disagree: {where}: rows of {name} hold different counts of numbers")
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _chunk_rows(array: pyarrow.Array, name: str, where: str) -> Num[np.ndarray, "rows dim"]:
    import pyarrow.compute

    num_rows, is_vector = len(array), _is_list(array.type)
    while _is_list(array.type):
        sizes = pyarrow.compute.list_value_length(array)
        if array.null_count or pyarrow.compute.min(sizes).as_py() != pyarrow.compute.max(sizes).as_py():
            odd = np.flatnonzero(sizes.to_numpy(zero_copy_only=False) != sizes[0].as_py())
            raise DataError(
                f"lengths disagree: {where}: rows of {name} must hold the same count of numbers; the first has "
                f"{sizes[0].as_py()}, the one at {int(odd[0]) if len(odd) else 0} has "
                f"{sizes[int(odd[0]) if len(odd) else 0].as_py()}"
            )
        array = array.flatten()
    # A missing number becomes NaN, which the check for finite values names.
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind in "bO":
        values = values.astype(np.float32)
    return np.asarray(values).reshape(num_rows, -1) if is_vector or num_rows else values.reshape(0, 1)
