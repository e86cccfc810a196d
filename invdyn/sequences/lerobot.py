"""LeRobot v2.0, v2.1 and v3.0: Parquet files with a row per frame, in which obs_t and action_t share a row.

Nothing is recorded after the last action: T rows give T - 1 transitions. Episodes are cut where the `episode_index` of
the rows changes, where frames are missing, and, in v3.0, at the boundaries that `meta/episodes` lists; never where a
file or a row group happens to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from invdyn import storage
from invdyn.errors import DataError
from invdyn.sequences.base import GIVEN_SPLITS, SPLIT_NAMES, EpisodeArrays, Index, SequencePlan
from invdyn.sequences.boundaries import runs_between
from invdyn.sequences.chained import Edges, join_across_files
from invdyn.sequences.file_reader import FAIL, FileReader, changed, plan_file
from invdyn.sequences.files import find_files, read_json, read_json_lines, source_file
from invdyn.sequences.hdf5 import side_by_side
from invdyn.sequences.parquet import (
    LastGroup,
    column_types,
    column_width,
    describe_columns,
    open_parquet,
    read_numbers,
    read_rows,
)

if TYPE_CHECKING:
    import pyarrow.parquet

INFO = "meta/info.json"
EPISODES_LINES = "meta/episodes.jsonl"
EPISODES_FOLDER = "meta/episodes"
DATA_FOLDER = "data"
SUFFIX = ".parquet"
STATE_KEY = "observation.state"
EPISODE_INDEX = "episode_index"
FRAME_INDEX = "frame_index"
GLOBAL_INDEX = "index"
FROM_INDEX = "dataset_from_index"
TO_INDEX = "dataset_to_index"
NUMERIC_KINDS = ("float", "int", "uint", "bool", "double")


@dataclass(frozen=True)
class Listed:
    """Episodes as the metadata lists them.

    Attributes:
        lengths: rows of each episode, by its number.
        boundaries: sorted global row numbers at which an episode starts or ends; empty in v2.
    """

    lengths: dict[int, int]
    boundaries: Int[np.ndarray, "boundaries"]


class LerobotReader(FileReader):
    """Reads a LeRobot dataset folder.

    Args:
        path: the folder that holds `meta` and `data`.
        state_keys: columns that make the state.
        action_key: column of the actions.
        on_error: `fail` or `skip`.
    """

    format_name = "lerobot"
    default_state_keys = (STATE_KEY,)
    default_action_key = "action"

    def __init__(
        self,
        path: str | Path,
        state_keys: Iterable[str] | None = None,
        action_key: str | None = None,
        *,
        on_error: str = FAIL,
    ):
        super().__init__(path, state_keys, action_key, on_error=on_error)
        self._listed = Listed({}, np.zeros(0, dtype=np.int64))
        self._rows_before = 0
        self._num_inspected = 0
        self._edges: dict[str, Edges] = {}

    @classmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether there is a meta/info.json, or Parquet files in a data folder."""
        root = str(path)
        return storage.is_folder(root) and (
            storage.exists(storage.join(root, INFO))
            or bool(find_files(storage.join(root, DATA_FOLDER), (SUFFIX,), recursive=True))
        )

    def find(self) -> list[str]:
        """Return the Parquet files with the rows."""
        return find_files(storage.join(self.path, DATA_FOLDER), (SUFFIX,), recursive=True)

    def inspect(self, without: Mapping[str, str] | None = None) -> SequencePlan:
        """Read the metadata, each file's footer and its columns of indices; say where they differ."""
        if not storage.exists(self.path):
            return super().inspect(without)
        if not storage.exists(storage.join(self.path, INFO)):
            raise DataError(
                f"not a lerobot recording: {self.path} has no {INFO}; copy the dataset's meta folder beside data"
            )
        info = read_json(storage.join(self.path, INFO))
        self._listed = _listed_episodes(self.path)
        self._rows_before = 0
        self._num_inspected = 0
        plan = join_across_files(super().inspect(without), self._edges)
        self._edges = {}  # the reader travels to every worker
        return _with_metadata(plan, info, self._listed, self.path)

    def inspect_file(self, path: str) -> SequencePlan:
        """Read the footer and the columns of indices."""
        self._num_inspected += 1
        with open_parquet(path) as file:
            state_dim = sum(column_width(file, key, path) for key in self.state_keys)
            action_dim = column_width(file, self.action_key, path)
            indices = _read_indices(file, path)
            total = file.metadata.num_rows
        if total == 0:
            raise DataError(f"a recording must hold at least one episode: {path}: it has 0 rows")
        rows = indices.get(GLOBAL_INDEX, np.arange(self._rows_before, self._rows_before + total))
        self._rows_before = int(rows[-1]) + 1
        numbers = indices[EPISODE_INDEX]
        changes = np.diff(numbers) != 0
        listed = np.isin(rows[1:], self._listed.boundaries)
        holes = _holes(indices, changes)
        first_row, num_rows = runs_between(np.append(changes | listed | holes, True))
        only_listed, only_holes = int((listed & ~changes).sum()), int((holes & ~changes & ~listed).sum())
        warnings = []
        if only_listed:
            warnings.append(
                f"{path}: {EPISODES_FOLDER} has {only_listed} boundaries inside an {EPISODE_INDEX}; cut there too"
            )
        if only_holes:
            warnings.append(
                f"{path}: frames are missing at {only_holes} places inside episodes; the episodes are cut there"
            )
        source = replace(source_file(path, self.path), rows=(total,))
        frames = indices.get(FRAME_INDEX, indices.get(GLOBAL_INDEX))
        self._edges[source.path] = Edges(
            order=self._num_inspected,
            num_rows=total,
            episode=(int(numbers[0]), int(numbers[-1])),
            frame=None if frames is None else (int(frames[0]), int(frames[-1])),
            starts_at_boundary=bool(np.isin(rows[0], self._listed.boundaries)),
        )
        return plan_file(
            source,
            num_states=num_rows,
            num_actions=num_rows,
            dims=(state_dim, action_dim),
            episode_index=numbers[first_row],
            first_row=first_row,
            warnings=warnings,
        )

    def read(self, plan: SequencePlan) -> EpisodeArrays:
        """Read the columns of the planned rows at once, from each file that holds some of them."""
        file = plan.files[plan.file_index[0]]
        assert plan.first_row is not None
        first, stop = int(plan.first_row[0]), int(plan.first_row[-1] + plan.num_states[-1])
        if stop - first != plan.num_states.sum():
            raise changed(file.path)
        last = self.keep(file, LastGroup)
        pieces: list[EpisodeArrays] = []
        for path, rows, end in zip((file.path, *file.parts), file.rows, np.cumsum(file.rows).tolist(), strict=True):
            start = end - rows
            if first < end and stop > start:
                with open_parquet(path) as table:
                    if table.metadata.num_rows != rows:
                        raise changed(path)
                    pieces.append(self._read_piece(table, max(first - start, 0), min(stop - start, rows), path, last))
        state, action = ([getattr(piece, name) for piece in pieces] for name in ("state", "action"))
        arrays = pieces[0] if len(pieces) == 1 else EpisodeArrays(np.concatenate(state), np.concatenate(action))
        if (arrays.state.shape[1], arrays.action.shape[1]) != plan.dims:
            raise changed(file.path)
        return arrays

    def _read_piece(
        self, table: pyarrow.parquet.ParquetFile, first: int, stop: int, path: str, last: LastGroup
    ) -> EpisodeArrays:
        columns = read_rows(table, list(dict.fromkeys((*self.state_keys, self.action_key))), first, stop, path, last)
        return EpisodeArrays(side_by_side([columns[key] for key in self.state_keys]), columns[self.action_key])


def _read_indices(file: pyarrow.parquet.ParquetFile, path: str) -> dict[str, Int[np.ndarray, "rows"]]:
    names = [name for name in (EPISODE_INDEX, FRAME_INDEX, GLOBAL_INDEX) if name in column_types(file)]
    if EPISODE_INDEX not in names:
        raise DataError(
            f"key {EPISODE_INDEX!r} is missing, so episodes cannot be told apart: {path}: found "
            f"{describe_columns(file)}"
        )
    return {name: values.astype(np.int64) for name, values in read_numbers(file, names).items()}


def _holes(indices: Mapping[str, np.ndarray], changes: Bool[np.ndarray, "rows"]) -> Bool[np.ndarray, "rows"]:
    """Return after which rows frames are missing (or begin anew) within an episode."""
    name = FRAME_INDEX if FRAME_INDEX in indices else GLOBAL_INDEX
    if name not in indices:
        return np.zeros(len(changes), dtype=bool)
    return np.asarray((np.diff(indices[name]) != 1) & ~changes)


def _listed_episodes(root: str) -> Listed:
    """Read the list of episodes of v3.0 (Parquet) or v2 (JSON lines)."""
    tables = find_files(storage.join(root, EPISODES_FOLDER), (SUFFIX,), recursive=True)
    lengths: dict[int, int] = {}
    boundaries: list[np.ndarray] = []
    for path in tables:
        with open_parquet(path) as file:
            missing = [name for name in (EPISODE_INDEX, FROM_INDEX, TO_INDEX) if name not in column_types(file)]
            if missing:
                raise DataError(f"key {missing[0]!r} is missing: {path}: found {describe_columns(file)}")
            columns = read_numbers(file, [EPISODE_INDEX, FROM_INDEX, TO_INDEX])
        lengths |= zip(columns[EPISODE_INDEX].tolist(), (columns[TO_INDEX] - columns[FROM_INDEX]).tolist(), strict=True)
        boundaries += [columns[FROM_INDEX], columns[TO_INDEX]]
    lines = storage.join(root, EPISODES_LINES)
    if not tables and storage.exists(lines):
        lengths = {
            int(line[EPISODE_INDEX]): int(line.get("length", -1))
            for line in read_json_lines(lines)
            if EPISODE_INDEX in line
        }
    return Listed(lengths, np.unique(np.concatenate(boundaries)) if boundaries else np.zeros(0, dtype=np.int64))


def _with_metadata(plan: SequencePlan, info: Mapping[str, Any], listed: Listed, root: str) -> SequencePlan:
    """Add what the metadata says: facts, splits, and where it differs from the rows."""
    numbers, where = np.unique(plan.episode_index, return_inverse=True)
    rows = dict(zip(numbers.tolist(), np.bincount(where, plan.num_states).astype(int).tolist(), strict=True))
    facts: dict[str, str | float] = {"format_version": str(info.get("codebase_version", "unknown"))}
    if isinstance(info.get("fps"), int | float) and info["fps"] > 0:
        facts["dt_s"] = 1.0 / info["fps"]
    if isinstance(info.get("robot_type"), str):
        facts["robot_type"] = info["robot_type"]
    split, warnings = _given_split(plan.episode_index, numbers, info.get("splits"))
    warnings = [
        *plan.warnings,
        *(f"{root}: {line}; the rows are used" for line in (*_differences(info, listed, rows), *warnings)),
        *(f"{root}: {line}" for line in _feature_differences(plan, info)),
    ]
    return replace(plan, attributes=facts, given_split=split, warnings=tuple(warnings))


def _differences(info: Mapping[str, Any], listed: Listed, rows: Mapping[int, int]) -> Iterable[str]:
    for key, found in (("total_episodes", len(rows)), ("total_frames", sum(rows.values()))):
        if info.get(key, found) != found:
            yield f"{INFO} says {key} {info[key]}, the files have {found}"
    if not listed.lengths:
        yield f"no list of episodes ({EPISODES_FOLDER} or {EPISODES_LINES})"
        return
    absent = sorted(set(listed.lengths) - set(rows))
    unlisted = sorted(set(rows) - set(listed.lengths))
    wrong = [number for number, count in rows.items() if listed.lengths.get(number, -1) not in (-1, count)]
    if absent:
        yield f"the metadata lists {len(listed.lengths)} episodes, {len(absent)} without rows (first {absent[0]})"
    if unlisted:
        yield f"{len(unlisted)} episodes have rows but are not in the metadata (first {unlisted[0]})"
    if wrong:
        yield (
            f"the metadata has another length for {len(wrong)} episodes: episode {wrong[0]} is listed with "
            f"{listed.lengths[wrong[0]]} rows and has {rows[wrong[0]]}"
        )


def _feature_differences(plan: SequencePlan, info: Mapping[str, Any]) -> Iterable[str]:
    """Compare the feature list with the columns of the first file."""
    features = info.get("features")
    if not isinstance(features, dict) or not plan.files:
        return
    with open_parquet(plan.files[0].path) as file:
        columns = set(column_types(file))
    numeric = {
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and str(feature.get("dtype")).startswith(NUMERIC_KINDS)
    }
    if missing := sorted(numeric - columns):
        yield f"{INFO} lists the feature {', '.join(missing)}, the files have no such column"
    if extra := sorted(columns - set(features)):
        yield f"{INFO} does not list the columns {', '.join(extra)} that the files have"


def _given_split(episode_index: Index, numbers: Index, splits: Any) -> tuple[Index | None, list[str]]:
    """Return the split of each episode where the metadata names more than one, and what is wrong with its ranges."""
    if not isinstance(splits, dict):
        return None, []
    ranges: dict[str, tuple[int, int]] = {}
    for name, text in splits.items():
        first, _, stop = str(text).partition(":")
        if name in SPLIT_NAMES and first.isdigit() and stop.isdigit():
            ranges[name] = (int(first), int(stop))
    warnings = [
        f"{INFO} says split {name} is episodes {first}:{stop}, but only {len(numbers)} have rows"
        for name, (first, stop) in ranges.items()
        if stop > int(numbers[-1]) + 1
    ]
    if len({SPLIT_NAMES[name] for name in ranges}) < 2:
        return None, warnings
    split = np.full(len(episode_index), -1, dtype=np.int64)
    for name, (start, end) in ranges.items():
        split[(episode_index >= start) & (episode_index < end)] = GIVEN_SPLITS.index(SPLIT_NAMES[name])
    return split, warnings
