"""Files that turn out to be damaged when they are read: truncated, corrupt, or with values that are no numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool

from invdyn.errors import DataError
from invdyn.sequences.base import SequencePlan, SequenceReader, check_finite
from invdyn.sequences.chained import split_by_file
from invdyn.transitions.blocks import iter_blocks
from invdyn.transitions.plan import Segment, kept_pieces
from invdyn.transitions.windows import Window


class DamagedFiles(DataError):
    """Files of a recording that cannot be used: the work has to be planned again without them.

    Attributes:
        files: path of each on disk, and the reason.
    """

    def __init__(self, files: Mapping[str, str]):
        super().__init__(next(iter(files.values()), ""))
        self.files = dict(files)


def find_damaged(reader: SequenceReader, sequences: SequencePlan, keep: Bool[np.ndarray, "episodes"]) -> dict[str, str]:
    """Read the kept episodes once more, file by file, and return every file that cannot be used, with the reason."""
    found: dict[str, str] = {}
    for piece in kept_pieces(sequences, keep):
        for part, first_step in split_by_file(piece) if piece.files[0].rows else [(piece, 0)]:
            path = part.files[0].path
            if path in found:
                continue
            try:
                _read_all(reader, part, first_step)
            except DataError as error:
                found[path] = str(error)
    return found


def _read_all(reader: SequenceReader, piece: SequencePlan, first_step: int) -> None:
    """Read all transitions, in bounded memory."""
    if piece.files[0].rows:
        # Such files are read at once anyway, and a row alone in its file belongs to transitions too.
        check_finite(reader.read(piece), piece, first_step)
        return
    rows = Window().num_rows(piece.num_states, piece.num_actions)
    whole = Segment(0, 0, piece, split=np.zeros_like(rows), row_limit=rows, keep=rows > 0, hash_files=())
    for _ in iter_blocks(reader, Window(), whole, rows):
        pass
