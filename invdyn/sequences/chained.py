"""Episodes that go on from one file to the next: such files are taken as one.

So no transition is lost between them, and all pieces of an episode have one identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool

from invdyn import storage
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

    def goes_on(self, before: Edges) -> bool:
        """Return whether the first row is of the episode of the last row before; frames may be missing between."""
        if self.frame is not None and before.frame is not None and self.frame[0] <= before.frame[1]:
            return False  # it begins anew: another episode of that number
        return self.episode[0] == before.episode[1]

    def continues(self, before: Edges) -> bool:
        """Return whether the first row is the one after the last row of another file."""
        follows = self.goes_on(before) and self.order == before.order + 1
        return follows and not self.misses_frames(before) and not self.starts_at_boundary

    def misses_frames(self, before: Edges) -> bool:
        """Return whether frames are known to be missing between two rows of an episode."""
        return self.frame is not None and before.frame is not None and self.frame[0] != before.frame[1] + 1


def join_across_files(plan: SequencePlan, edges: Mapping[str, Edges]) -> SequencePlan:
    """Return the plan with each chain of files that an episode goes on across as one file of several parts.

    Where no frame is missing between two files, the pieces on both sides become one.

    Args:
        plan: pieces of episodes, each within one file, with the first row and the rows of each.
        edges: of every file, by `SourceFile.path`.
    """
    ends = [edges[file.path] for file in plan.files]
    joined = np.array([False, *(b.goes_on(a) for a, b in pairwise(ends))])
    if not joined.any():
        return plan
    assert plan.first_row is not None
    chain = np.cumsum(~joined) - 1
    rows = np.array([end.num_rows for end in ends])
    starts = np.cumsum(rows) - rows
    offset = starts - starts[~joined][chain]  # rows of the chain before each file
    # The first piece of a file that continues another is the rest of the piece before it.
    continued = np.array([False, *(b.continues(a) for a, b in pairwise(ends))])
    is_first = np.diff(plan.file_index, prepend=-1) != 0
    is_rest = is_first & continued[plan.file_index]
    heads = np.flatnonzero(~is_rest)
    columns: dict[str, Any] = {n: v[heads] for n in EPISODE_COLUMNS if (v := getattr(plan, n)) is not None}
    columns["first_row"] = (plan.first_row + offset[plan.file_index])[heads]
    for name in ("num_states", "num_actions"):
        columns[name] = np.add.reduceat(getattr(plan, name), heads)
    cut = [i for i in np.flatnonzero(joined & ~continued).tolist() if ends[i].misses_frames(ends[i - 1])]
    warning = f"frames are missing before {len(cut)} files inside episodes; the episodes are cut there"
    return replace(
        plan,
        files=_chains(plan.files, joined),
        file_index=chain[plan.file_index[heads]],
        warnings=(*plan.warnings, f"{plan.files[cut[0]].path}: {warning}") if cut else plan.warnings,
        **columns,
    )


def split_by_file(plan: SequencePlan) -> Iterator[tuple[SequencePlan, int]]:
    """Undo `join_across_files` for a plan of one chain: yield the plan of each file on disk with some of its rows.

    Yields:
        The plan, and how many steps of its first episode lie before it.
    """
    (file,) = plan.files
    assert plan.first_row is not None
    ends = np.cumsum(file.rows)
    for path, rows, end in zip((file.path, *file.parts), file.rows, ends.tolist(), strict=True):
        first = np.maximum(plan.first_row, end - rows)
        counts = np.minimum(plan.first_row + plan.num_states, end) - first
        inside = np.flatnonzero(counts > 0)
        if len(inside):
            here = plan.slice(int(inside[0]), int(inside[-1]) + 1)
            yield (
                replace(
                    here,
                    files=(replace(file, path=path, parts=(), rows=(rows,)),),
                    first_row=first[inside] - (end - rows),
                    num_states=counts[inside],
                    num_actions=counts[inside],
                ),
                int((first - plan.first_row)[inside[0]]),
            )


def _chains(files: Sequence[SourceFile], joined: Bool[np.ndarray, "files"]) -> tuple[SourceFile, ...]:
    chains: list[SourceFile] = []
    for file, continues in zip(files, joined.tolist(), strict=True):
        if continues:
            before = chains[-1]
            chains[-1] = replace(
                before,
                size=before.size + file.size,
                version=storage.common_version([before.version, file.version]),
                parts=(*before.parts, file.path),
                rows=before.rows + file.rows,
            )
        else:
            chains.append(file)
    return tuple(chains)
