"""Episodes that go on from one file to the next: such files are taken as one, so that no transition is lost between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool

from invdyn.sequences.base import EPISODE_COLUMNS, SequencePlan, SourceFile


@dataclass(frozen=True)
class Edges:
    """The first and the last row of a file.

    Attributes:
        order: number of the file in reading order.
        num_rows: rows of the file.
        episode: episode of the first and of the last row.
        frame: frame of the first and of the last row, in the episode or in all; None where neither is recorded.
        starts_at_boundary: whether the metadata says that an episode starts with the first row.
    """

    order: int
    num_rows: int
    episode: tuple[int, int]
    frame: tuple[int, int] | None
    starts_at_boundary: bool

    def continues(self, before: Edges) -> bool:
        """Return whether the first row is the one after the last row of another file."""
        follows = self.order == before.order + 1 and self.episode[0] == before.episode[1]
        if self.frame is not None and before.frame is not None:
            follows = follows and self.frame[0] == before.frame[1] + 1
        return follows and not self.starts_at_boundary


def join_across_files(plan: SequencePlan, edges: Mapping[str, Edges]) -> SequencePlan:
    """Return the plan with each chain of files that an episode continues across as one file of several parts.

    Args:
        plan: pieces of episodes, each within one file, with the first row and the rows of each.
        edges: of every file, by `SourceFile.path`.
    """
    ends = [edges[file.path] for file in plan.files]
    joined = np.array([False, *(b.continues(a) for a, b in pairwise(ends))])
    if not joined.any():
        return plan
    assert plan.first_row is not None
    chain = np.cumsum(~joined) - 1
    rows = np.array([end.num_rows for end in ends])
    starts = np.cumsum(rows) - rows
    offset = starts - starts[~joined][chain]  # rows of the chain before each file
    # The first piece of a file that continues another is the rest of the piece before it.
    is_first = np.diff(plan.file_index, prepend=-1) != 0
    is_rest = is_first & joined[plan.file_index]
    heads = np.flatnonzero(~is_rest)
    columns: dict[str, Any] = {n: v[heads] for n in EPISODE_COLUMNS if (v := getattr(plan, n)) is not None}
    columns["first_row"] = (plan.first_row + offset[plan.file_index])[heads]
    for name in ("num_states", "num_actions"):
        columns[name] = np.add.reduceat(getattr(plan, name), heads)
    return replace(plan, files=_chains(plan.files, joined), file_index=chain[plan.file_index[heads]], **columns)


def _chains(files: Sequence[SourceFile], joined: Bool[np.ndarray, "files"]) -> tuple[SourceFile, ...]:
    chains: list[SourceFile] = []
    for file, continues in zip(files, joined.tolist(), strict=True):
        if continues:
            before = chains[-1]
            chains[-1] = replace(
                before,
                size=before.size + file.size,
                mtime_ns=max(before.mtime_ns, file.mtime_ns),
                parts=(*before.parts, file.path),
            )
        else:
            chains.append(file)
    return tuple(chains)
