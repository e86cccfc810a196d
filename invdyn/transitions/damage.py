"""Files that turn out to be damaged when they are read: truncated, corrupt, or with values that are no numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool

from invdyn.errors import DataError
from invdyn.sequences.base import SequencePlan, SequenceReader, check_finite


class DamagedFiles(DataError):
    """Files of a recording that cannot be used: the work has to be planned again without them.

    Attributes:
        files: `SourceFile.path` of each, and the reason.
    """

    def __init__(self, files: Mapping[str, str]):
        super().__init__(next(iter(files.values()), ""))
        self.files = dict(files)


def find_damaged(reader: SequenceReader, sequences: SequencePlan, keep: Bool[np.ndarray, "episodes"]) -> dict[str, str]:
    """Read the kept episodes once more, piece by piece, and return every file that cannot be used, with the reason."""
    found: dict[str, str] = {}
    for piece in kept_pieces(sequences, keep):
        path = piece.files[0].path
        if path in found:
            continue
        try:
            check_finite(reader.read(piece), piece)
        except DataError as error:
            found[path] = str(error)
    return found


def kept_pieces(sequences: SequencePlan, keep: Bool[np.ndarray, "episodes"]) -> Iterator[SequencePlan]:
    """Return the plans of the kept episodes, neighbours within a file together."""
    kept = np.flatnonzero(keep)
    for run in np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1):
        if len(run):
            yield from sequences.slice(int(run[0]), int(run[-1]) + 1).by_file()
