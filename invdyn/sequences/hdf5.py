"""What the readers of HDF5 formats share: finding keys, checking and reading arrays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import h5py
import numpy as np
from jaxtyping import Num

from invdyn import storage
from invdyn.errors import DataError
from invdyn.sequences.files import HDF5_SUFFIXES, find_files, open_hdf5

MAX_KEYS_SHOWN = 20
MAX_VECTOR_NDIM = 2


def first_readable(path: str) -> str | None:
    """Return the first of a few files at `path` that opens as HDF5, or None."""
    for candidate in find_files(path, HDF5_SUFFIXES)[:3]:
        try:
            with open_hdf5(candidate):
                return candidate
        except DataError:
            continue
    return None


def find_hdf5(path: str) -> list[str]:
    """Return the HDF5 files at `path`, in numeric order of their names."""
    return find_files(path, HDF5_SUFFIXES) if storage.exists(path) else []


def array_shapes(group: h5py.Group) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays below a group, by path."""
    shapes: dict[str, tuple[int, ...]] = {}
    # A visitor that returns None goes on; h5py hands out groups as well as datasets.
    group.visititems(lambda name, node: shapes.update({name: node.shape}) if isinstance(node, h5py.Dataset) else None)
    return shapes


def describe_keys(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the keys and shapes, as an error lists them."""
    shown = [f"{name} {shape}" for name, shape in list(shapes.items())[:MAX_KEYS_SHOWN]]
    more = len(shapes) - len(shown)
    return (", ".join(shown) or "no arrays") + (f" and {more} more" if more > 0 else "")


def numbered_groups(group: h5py.Group, pattern: re.Pattern[str], where: str) -> dict[int, str]:
    """Return the names in a group that match a pattern, whose first group is a number, by their numbers in order.

    Raises:
        DataError: when two have the same number, as `demo_1` and `demo_01`.
    """
    names: dict[int, str] = {}
    for name in group:
        found = pattern.fullmatch(name)
        if found is None:
            continue
        other = names.setdefault(int(found[1]), name)
        if other != name:
            raise DataError(f"episodes must have different numbers: {where}: found {other} and {name}; rename one")
    return dict(sorted(names.items()))


def only_key(group: object) -> str | None:
    """Return the one array below a group that can be the state without a choice, or None."""
    if not isinstance(group, h5py.Group):
        return None
    everything = list(array_shapes(group))
    found = everything if len(everything) == 1 else vector_keys(group)
    return found[0] if len(found) == 1 else None


def vector_keys(group: h5py.Group) -> list[str]:
    """Return the paths of the numeric arrays below a group that hold a number or a vector per row."""
    names = array_shapes(group)
    return [n for n, shape in names.items() if 1 <= len(shape) <= MAX_VECTOR_NDIM and is_numeric(group[n].dtype)]


def is_numeric(dtype: np.dtype) -> bool:
    """Return whether values of this dtype can be part of a state: real numbers or flags."""
    return bool(dtype.kind in "fiub")


def numeric_array(group: h5py.Group, name: str, where: str) -> h5py.Dataset:
    """Return an array of numbers with one row per step.

    Args:
        group: what the name is relative to.
        name: path of the array.
        where: file and episode, for errors.

    Raises:
        DataError: when it is missing, a group, a scalar, without numbers or not numeric.
    """
    node = group.get(name)
    if not isinstance(node, h5py.Dataset):
        found = "a group" if isinstance(node, h5py.Group) else "missing"
        raise DataError(
            f"key {name!r} must be an array: {where}: it is {found}; found {describe_keys(array_shapes(group))}; "
            "set shape_meta.obs and shape_meta.action_key to keys of the recording"
        )
    check_numeric(node.dtype, node.shape, name, where)
    return node


def check_numeric(dtype: np.dtype, shape: tuple[int, ...], name: str, where: str) -> None:
    """Check that an array holds numbers, at least one in each row.

    Raises:
        DataError: when it does not.
    """
    if not is_numeric(dtype):
        raise DataError(f"{name} must be numeric: {where}: it is {dtype}; choose other keys in shape_meta")
    if not shape or 0 in shape[1:]:
        raise DataError(
            f"{name} must have a row per step, of at least 1 number: {where}: its shape is {shape}; choose other keys "
            "in shape_meta"
        )


def check_flags(shape: tuple[int, ...], name: str, where: str) -> None:
    """Check that an array holds one value per row.

    Raises:
        DataError: when it holds more.
    """
    if width(shape) != 1:
        raise DataError(
            f"{name} must hold one flag per row: {where}: its shape is {shape}; keep the one that ends an episode"
        )


def check_rows(sizes: Mapping[str, int], where: str) -> None:
    """Check that arrays have the same number of rows.

    Raises:
        DataError: naming them when they have not.
    """
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"lengths disagree: {where}: rows of {listed}; remove or repair the episode")


def width(shape: tuple[int, ...]) -> int:
    """Return the numbers per row of an array of this shape."""
    return int(np.prod(shape[1:], dtype=np.int64))


def flat_rows(values: np.ndarray) -> Num[np.ndarray, "rows dim"]:
    """Return an array as (rows, dim), flags as numbers."""
    rows = values.reshape(len(values), -1) if values.size else values.reshape(len(values), width(values.shape))
    return rows.astype(np.float32) if rows.dtype.kind == "b" else rows


def side_by_side(columns: list[np.ndarray]) -> Num[np.ndarray, "rows dim"]:
    """Return columns of the same rows as one array; no copy when there is only one."""
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def attributes(attrs: Mapping[str, object], names: Iterable[str] | None = None) -> dict[str, str | float]:
    """Return the attributes that are text, a number or a flag: all, or the named ones that are there."""
    found: dict[str, str | float] = {}
    for name in attrs if names is None else names:
        value = attrs.get(name)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, str):
            found[name] = value
        elif isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
            found[name] = float(value)
    return found
