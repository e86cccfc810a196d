"""Files that turn out to be damaged when they are read: truncated, corrupt, or with values that are no numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool

from invdyn.errors import DataError
from invdyn.sequences.base import SequencePlan, SequenceReader
from invdyn.transitions.blocks import iter_blocks
from invdyn.transitions.plan import Segment
from invdyn.transitions.windows import Window


class DamagedFiles(DataError):
    """Files of a recording that cannot be used: the work has to be planned again without them.

    Attributes:
        files: `SourceFile.path` of each, and the reason.
    """

    def __init__(self, files: Mapping[str, str]):
        super().__init__(next(iter(files.values()), ""))
        self.files = dict(files)


def find_damaged(reader: SequenceReader, sequences: SequencePlan, keep: Bool[np.ndarray, "episodes"]) -> dict[str, str]:
    """Read the kept episodes once more, file by file, and return every file that cannot be used, with the reason."""
    found: dict[str, str] = {}
    for piece in kept_pieces(sequences, keep):
        path = piece.files[0].path
        if path in found:
            continue
        try:
            _read_all(reader, piece)
        except DataError as error:
            found[path] = str(error)
    return found


def _read_all(reader: SequenceReader, piece: SequencePlan) -> None:
    """Read all transitions, in bounded memory."""
    rows = Window().num_rows(piece.num_states, piece.num_actions)
    whole = Segment(0, 0, piece, split=np.zeros_like(rows), row_limit=rows, keep=rows > 0, hash_files=())
    for _ in iter_blocks(reader, Window(), whole, rows):
        pass


def kept_pieces(sequences: SequencePlan, keep: Bool[np.ndarray, "episodes"]) -> Iterator[SequencePlan]:
    """Return the plans of the kept episodes, neighbours within a file together."""
    kept = np.flatnonzero(keep)
    for run in np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1):
        if len(run):
            yield from sequences.slice(int(run[0]), int(run[-1]) + 1).by_file()
