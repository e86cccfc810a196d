"""CSV folders: a state file and an action file per episode, with N states and N or N - 1 actions, a row per step.

The two files of an episode have the same path but for the word that says which they are: `state_3.csv` and
`action_3.csv`, `episode_3/states.csv` and `episode_3/actions.csv`, `observations/3.csv` and `actions/3.csv`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Num

from invdyn import storage
from invdyn.errors import DataError
from invdyn.sequences.base import EpisodeArrays, SequencePlan
from invdyn.sequences.file_reader import FAIL, FileReader, changed, plan_file
from invdyn.sequences.files import find_files, open_binary, reading, source_file

if TYPE_CHECKING:
    import pyarrow

SUFFIX = ".csv"
WHOLE_STATE = "state"
WHOLE_ACTION = "action"
STATE_WORD = re.compile(r"(?i)(?<![a-z])(states?|observations?|obs)(?![a-z])")
ACTION_WORD = re.compile(r"(?i)(?<![a-z])(actions?)(?![a-z])")
DELIMITERS = ",;\t "
COUNT_BYTES = 8 * 2**20
NEW_LINE = ord("\n")
BLANKS = b"\r\n"


class CsvReader(FileReader):
    """Reads a folder of CSV files.

    Args:
        path: the folder.
        state_keys: columns of the state file that make the state; `state`, or nothing, for all of them.
        action_key: column of the action file; `action`, or nothing, for all of them.
        on_error: `fail` or `skip`.
        state_word: what the path of a state file has where that of an action file has `action_word`.
        action_word: the same for action files.
        header: whether the first line of each file holds names; found from the line when None.
    """

    format_name = "csv"
    default_state_keys = (WHOLE_STATE,)
    default_action_key = WHOLE_ACTION

    def __init__(
        self,
        path: str | Path,
        state_keys: Iterable[str] | None = None,
        action_key: str | None = None,
        *,
        on_error: str = FAIL,
        state_word: str | None = None,
        action_word: str | None = None,
        header: bool | None = None,
    ):
        super().__init__(path, state_keys, action_key, on_error=on_error)
        self.state_word = re.compile(re.escape(state_word)) if state_word else STATE_WORD
        self.action_word = re.compile(re.escape(action_word)) if action_word else ACTION_WORD
        self.header = header
        self._action_paths: dict[str, str] = {}
        self._alone: set[str] = set()
        self._counts = ""

    @classmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether there are .csv files."""
        return storage.is_folder(str(path)) and bool(find_files(str(path), (SUFFIX,), recursive=True))

    def find(self) -> list[str]:
        """Return the state files, having found the action file of each."""
        if not storage.is_folder(self.path):
            raise DataError(f"a csv recording must be a folder of state and action files: {self.path} is a file")
        found = find_files(self.path, (SUFFIX,), recursive=True)
        names = {path: storage.relative(path, self.path) for path in found}
        states, actions = self._by_episode(names, self.state_word), self._by_episode(names, self.action_word)
        self._alone = {(states.get(name) or actions[name]) for name in states.keys() ^ actions.keys()}
        self._counts = f"{len(states)} state files, {len(actions)} action files, {len(found)} CSV files"
        if not states or not actions or (self._alone and not self.skips_damaged):
            raise self._has_none(min(self._alone, default=self.path))
        self._action_paths = {states[name]: actions[name] for name in states if name in actions}
        # In the order of the files; those without a partner are refused when they are inspected.
        return [path for path in found if path in self._action_paths or path in self._alone]

    def inspect_file(self, path: str) -> SequencePlan:
        """Count the lines of both files and read their first ones."""
        if path in self._alone:
            raise self._has_none(path)
        action_path = self._action_paths[path]
        state_layout, action_layout = read_layout(path, self.header), read_layout(action_path, self.header)
        state_columns = state_layout.choose(self.state_keys, WHOLE_STATE, "shape_meta.obs")
        action_columns = action_layout.choose((self.action_key,), WHOLE_ACTION, "shape_meta.action_key")
        num_states, num_actions = state_layout.num_rows, action_layout.num_rows
        if num_actions not in (num_states, num_states - 1):
            raise DataError(
                f"lengths disagree: {path} has {num_states} states, {action_path} {num_actions} actions; N states need "
                "N - 1 actions (or N, the last one then unused)"
            )
        return plan_file(
            source_file(path, self.path, (action_path,)),
            num_states=np.array([num_states]),
            num_actions=np.array([num_actions]),
            dims=(len(state_columns), len(action_columns)),
        )

    def read(self, plan: SequencePlan) -> EpisodeArrays:
        """Read both files whole."""
        file = plan.files[plan.file_index[0]]
        state_layout, action_layout = (read_layout(path, self.header) for path in (file.path, file.parts[0]))
        state = read_columns(state_layout, state_layout.choose(self.state_keys, WHOLE_STATE, "shape_meta.obs"))
        action = read_columns(
            action_layout, action_layout.choose((self.action_key,), WHOLE_ACTION, "shape_meta.action_key")
        )
        if (len(state), len(action)) != (plan.num_states[0], plan.num_actions[0]):
            raise changed(file.path)
        return EpisodeArrays(state, action)

    def _has_none(self, path: str) -> DataError:
        return DataError(
            f"each state file must have an action file of the same name: {path} has none ({self._counts}); name them "
            "like state_0.csv and action_0.csv, or set format_options.state_word and action_word"
        )

    def _by_episode(self, names: dict[str, str], word: re.Pattern[str]) -> dict[str, str]:
        """Return the files whose name has a word, by their name without it."""
        found: dict[str, str] = {}
        for path, name in names.items():
            places = list(word.finditer(name.removesuffix(SUFFIX)))
            if not places:
                continue
            episode = f"{name[: places[-1].start()]}*{name[places[-1].end() :]}"
            if episode in found:
                raise DataError(
                    f"an episode must have one file of a kind: {found[episode]} and {path} are both {episode}"
                )
            found[episode] = path
        return found


@dataclass(frozen=True)
class Layout:
    """How a CSV file is written.

    Attributes:
        path: the file.
        delimiter: what separates columns.
        names: column names; `column 0` and on where the file has no header.
        has_header: whether the first line holds names.
        num_rows: lines with values.
    """

    path: str
    delimiter: str
    names: tuple[str, ...]
    has_header: bool
    num_rows: int

    def choose(self, keys: tuple[str, ...], whole: str, setting: str) -> list[int]:
        """Return the indices of columns by name; `whole` stands for all of them unless a column has that name.

        Raises:
            DataError: when a column is missing.
        """
        chosen: list[int] = []
        for key in keys:
            if key in self.names:
                chosen.append(self.names.index(key))
            elif key == whole:
                chosen += range(len(self.names))
            else:
                raise DataError(
                    f"key {key!r} is missing: {self.path}: found the columns {', '.join(self.names)} ({self.num_rows} "
                    f"rows each); set {setting} to columns of the file, or to {whole!r} for all"
                )
        return chosen


def read_layout(path: str, header: bool | None = None) -> Layout:
    """Find out how a CSV file is written, from its first lines, and count its rows.

    Args:
        path: the file.
        header: whether the first line holds names; found from the line when None.

    Raises:
        DataError: when it is missing, empty or not text, or a line before the last is blank.
    """
    with open_binary(path) as file, reading(path, UnicodeDecodeError):
        first = file.readline().decode("utf-8-sig").strip()
        if not first:
            raise DataError(
                f"a recording must hold at least one episode: {path}: the file is empty or its first line is"
            )
        if "\x00" in first:
            raise DataError(f"file is truncated, corrupt or of another kind: {path}: it is not text; record it again")
        cells_of = {mark: first.lstrip("# ").split(mark) for mark in DELIMITERS}
        delimiter = next((mark for mark in DELIMITERS if len(cells_of[mark]) > 1), ",")
        cells = [cell.strip().strip("\"'") for cell in cells_of[delimiter]]
        after = file.readline().decode("utf-8", "replace").strip()
        numbered = cells == [str(index) for index in range(len(cells))]
        if header is None and numbered and not _are_integers(after, delimiter):
            raise DataError(
                f"the first line must be clearly names or values: {path}: it is {first!r}, as columns without names "
                "are headed and whole values are written; set format_options.header to true (names) or false (values)"
            )
        has_header = not any(_is_number(cell) for cell in cells) if header is None else header
        file.seek(0)
        num_lines, blank = count_lines(file)
    if blank:
        raise DataError(
            f"each line must hold the values of a step: {path}: line {blank} is blank, and others follow; put in what "
            "is missing, or remove the episode"
        )
    names = tuple(cells) if has_header else tuple(f"column {index}" for index in range(len(cells)))
    return Layout(path, delimiter, names, has_header, num_lines - int(has_header))


def count_lines(file: object) -> tuple[int, int]:
    """Count the lines of an open file that hold something, in blocks: no loop over lines.

    Returns:
        How many there are, and the number of the first blank line before the last of them, from 1 on; 0 for none.
    """
    total = num_lines = last = blank = 0
    for filled in _filled_lines(file):
        where = np.flatnonzero(filled)
        if not blank and len(where) < len(filled):
            blank = num_lines + int(filled.argmin()) + 1
        if len(where):
            last = num_lines + int(where[-1]) + 1
        total += len(where)
        num_lines += len(filled)
    return total, blank if last > total else 0


def read_columns(layout: Layout, chosen: list[int]) -> Num[np.ndarray, "rows columns"]:
    """Read columns of a CSV file, by their indices.

    Raises:
        DataError: when it is corrupt or a column is not numeric.
    """
    import pyarrow
    from pyarrow import csv

    path = layout.path
    with open_binary(path) as file, reading(path, pyarrow.ArrowException):
        table = csv.read_csv(
            file,
            read_options=csv.ReadOptions(
                column_names=[str(index) for index in range(len(layout.names))], skip_rows=int(layout.has_header)
            ),
            parse_options=csv.ParseOptions(delimiter=layout.delimiter),
        )
    return np.stack([_numbers(table.column(index), layout.names[index], path) for index in chosen], axis=1)


def _numbers(column: pyarrow.ChunkedArray, name: str, path: str) -> Num[np.ndarray, "rows"]:
    import pyarrow

    kind = column.type
    if pyarrow.types.is_null(kind):
        return np.full(len(column), np.nan)
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)):
        raise DataError(f"{name} must be numeric: {path}: it is {kind}; choose other columns in shape_meta")
    # An empty cell becomes NaN, which the check for finite values names.
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return not cell
    return True


def _are_integers(line: str, delimiter: str) -> bool:
    """Return whether all cells of a line are whole numbers without point or exponent; also where there is no line."""
    return not line or all(re.fullmatch(r"[-+]?[0-9]+", cell.strip().strip("\"'")) for cell in line.split(delimiter))


def _filled_lines(file: object) -> Iterator[Bool[np.ndarray, "lines"]]:
    """Return which lines of an open file hold something, block by block."""
    rest = b""
    while block := file.read(COUNT_BYTES):  # type: ignore[attr-defined]
        block = rest + block
        cut = block.rfind(b"\n") + 1
        rest = block[cut:]
        values = np.frombuffer(block[:cut], dtype=np.uint8)
        ends = np.flatnonzero(values == NEW_LINE)
        # What is in a line, as a running count: equal at both ends of an empty line.
        filled = np.cumsum(~np.isin(values, np.frombuffer(BLANKS, dtype=np.uint8)))
        yield np.diff(filled[ends], prepend=0) > 0
    yield np.array([bool(rest.strip(BLANKS))])
