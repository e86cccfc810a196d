"""Which reader reads a recording."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from invdyn import storage
from invdyn.errors import ConfigError, DataError
from invdyn.sequences.base import SequenceReader
from invdyn.sequences.csv_folder import CsvReader
from invdyn.sequences.d4rl import D4rlReader
from invdyn.sequences.diffusion_policy import DiffusionPolicyReader
from invdyn.sequences.files import open_hdf5
from invdyn.sequences.hdf5 import array_shapes, describe_keys, first_readable
from invdyn.sequences.lerobot import LerobotReader
from invdyn.sequences.minari import MinariReader
from invdyn.sequences.native import NativeReader
from invdyn.sequences.ogbench import OgbenchReader
from invdyn.sequences.robomimic import RobomimicReader

# In the order in which they are asked whether they recognise a recording: the most particular layouts first.
READERS: dict[str, type[SequenceReader]] = {
    reader.format_name: reader
    for reader in (
        NativeReader,
        LerobotReader,
        DiffusionPolicyReader,
        MinariReader,
        D4rlReader,
        RobomimicReader,
        OgbenchReader,
        CsvReader,
    )
}
COMMON_ARGUMENTS = ("self", "path", "state_keys", "action_key")
KINDS = {str: "text", bool: "true or false", Sequence[str]: "a list of texts"}


def open_sequences(
    path: str,
    *,
    format_name: str | None = None,
    state_keys: Iterable[str] | None = None,
    action_key: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> SequenceReader:
    """Return the reader of the recording at `path`, found from its files unless `format_name` says.

    Args:
        path: folder or file.
        format_name: a key of `READERS`.
        state_keys: the observation keys that make the state, in order; the format's own default when None.
        action_key: the key of the actions; the format's own default when None.
        options: further arguments of the format's reader, such as `on_error`.

    Raises:
        ConfigError: for an unknown format name, or an option that the format does not have, or not of that type.
        DataError: when the path does not exist or no reader recognises it.
    """
    if format_name is not None and format_name not in READERS:
        raise ConfigError(f"unknown format {format_name!r}; known formats: {', '.join(sorted(READERS))}")
    given: dict[str, Any] = {"state_keys": tuple(state_keys) if state_keys else None, "action_key": action_key}
    given = {name: value for name, value in given.items() if value is not None} | dict(options or {})
    reader = READERS[format_name] if format_name is not None else find_reader(path)
    check_options(reader, options or {})
    return reader(path, **given)  # type: ignore[call-arg]


def find_reader(path: str) -> type[SequenceReader]:
    """Return the reader that recognises the files at `path`.

    Raises:
        DataError: when none does.
    """
    if not storage.exists(path):
        return NativeReader
    for reader in READERS.values():
        if reader.recognises(path):
            return reader
    first = first_readable(path)
    if first is None:
        # The native reader's own checks say best what is wrong with an empty folder or a damaged HDF5 file.
        NativeReader(path).inspect()
        raise DataError(f"no reader recognises {path}; set format to one of {', '.join(sorted(READERS))}")
    with open_hdf5(first) as file:
        found = describe_keys(array_shapes(file))
    raise DataError(
        f"no reader recognises {path}: {first} holds {found}; set format to one of {', '.join(sorted(READERS))}"
    )


def check_options(reader: type[SequenceReader], options: Mapping[str, Any]) -> None:
    """Check that a reader has the options given, and that they are of its types.

    Raises:
        ConfigError: naming those it has and the nearest one, or the type.
    """
    types = get_type_hints(reader.__init__)
    known = [name for name in inspect.signature(reader.__init__).parameters if name not in COMMON_ARGUMENTS]
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"format_options has no {name!r} for {reader.format_name}{hint} (it has {', '.join(known) or 'none'})"
            )
        kinds = get_args(types[name]) or (types[name],)
        if not any(_is_a(kind, value) for kind in kinds):
            wanted = " or ".join(KINDS[kind] for kind in kinds if kind in KINDS)
            quotes = f"; write {str(value)!r} in quotes" if str in kinds and type(value) in (int, float) else ""
            raise ConfigError(f"format_options.{name} must be {wanted}: got {value!r}{quotes}")


def _is_a(kind: Any, value: object) -> bool:
    if kind == Sequence[str]:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
