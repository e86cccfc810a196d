"""Which reader reads a recording."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from invdyn.errors import ConfigError, DataError
from invdyn.sequences.base import SequenceReader
from invdyn.sequences.native import NativeReader

READERS: dict[str, type[NativeReader]] = {NativeReader.format_name: NativeReader}


def open_sequences(
    path: str, *, format_name: str | None = None, state_keys: Iterable[str] | None = None, action_key: str | None = None
) -> SequenceReader:
    """Return the reader of the recording at `path`, found from its files unless `format_name` says.

    Args:
        path: folder or file.
        format_name: a key of `READERS`.
        state_keys: the observation keys that make the state, in order; the format's own default when None.
        action_key: the key of the actions; the format's own default when None.

    Raises:
        ConfigError: for an unknown format name.
        DataError: when the path does not exist or no reader recognises it.
    """
    if format_name is not None and format_name not in READERS:
        raise ConfigError(f"unknown format {format_name!r}; known formats: {', '.join(sorted(READERS))}")
    options = {"state_keys": tuple(state_keys) if state_keys else None, "action_key": action_key}
    given = {name: value for name, value in options.items() if value is not None}
    if format_name is not None or not Path(path).exists():
        return READERS[format_name or NativeReader.format_name](path, **given)  # type: ignore[arg-type]
    for reader in READERS.values():
        if reader.recognises(path):
            return reader(path, **given)  # type: ignore[arg-type]
    # The native reader's own checks say best what is wrong with an unrecognised HDF5 file or an empty folder.
    NativeReader(path, **given).inspect()  # type: ignore[arg-type]
    raise DataError(f"no reader recognises {path}; set format to one of {', '.join(sorted(READERS))}")
