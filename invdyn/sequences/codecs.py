"""Compressed chunks whose damage must be noticed."""

from __future__ import annotations

import zlib

BLOSC_HEADER_BYTES = 16
DAMAGE = (ValueError, KeyError, TypeError, EOFError, zlib.error)
"""What reading a damaged zarr array raises beside OSError and RuntimeError, depending on its compressor."""


def check_blosc() -> None:
    """Make numcodecs refuse a Blosc chunk that is cut: the library would read on behind its end.

    The header of a chunk (bytes 12 to 16, little-endian) says how long it is. Stricter than the codec that this takes
    the place of, for the whole process, and otherwise the same.
    """
    import numcodecs

    if getattr(numcodecs.registry.codec_registry.get("blosc"), "checks_length", False):
        return

    class CheckedBlosc(numcodecs.Blosc):  # type: ignore[misc]
        checks_length = True

        def decode(self, buf: object, out: object = None) -> object:
            content = memoryview(buf).cast("B")  # type: ignore[arg-type]
            stated = int.from_bytes(content[12:BLOSC_HEADER_BYTES], "little")
            if len(content) < BLOSC_HEADER_BYTES or stated != len(content):
                raise ValueError(f"a Blosc chunk of {stated} bytes has {len(content)}")
            return super().decode(buf, out)

    numcodecs.register_codec(CheckedBlosc, "blosc")
