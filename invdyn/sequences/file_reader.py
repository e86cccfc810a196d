"""What the readers of all formats share: one plan per file, joined into one."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from invdyn import storage
from invdyn.errors import ConfigError, DataError
from invdyn.sequences.base import EPISODE_COLUMNS, Index, SequencePlan, SequenceReader, SourceFile

FAIL, SKIP = "fail", "skip"
MAX_WARNINGS = 50

Kept = TypeVar("Kept")


class FileReader(SequenceReader):
    """Reads a recording that is a file or a folder of files, each of which can be inspected on its own.

    Args:
        path: file or folder.
        state_keys: keys that make the state, in order; the format's own default when None.
        action_key: key of the actions; the format's own default when None.
        on_error: `fail` at a file that cannot be used, or `skip` it and name it in the plan.
    """

    default_state_keys: tuple[str, ...] = ()
    """Empty where the keys are found in the file."""
    default_action_key = "actions"
    _kept: tuple[SourceFile, Any] | None = None
    where_it_comes_from = "set buffer_path to the recording"

    def __init__(
        self,
        path: str | Path,
        state_keys: Iterable[str] | None = None,
        action_key: str | None = None,
        *,
        on_error: str = FAIL,
    ):
        check_choice("on_error", on_error, (FAIL, SKIP))
        self.path = str(path)
        self.state_keys = tuple(state_keys or ()) or self.default_state_keys
        self.action_key = action_key or self.default_action_key
        self.skips_damaged = on_error == SKIP

    def keep(self, file: SourceFile, make: Callable[[], Kept]) -> Kept:
        """Return what the last read of a file left for the next one, or make it now; it does not travel.

        Filters may leave gaps between the episodes wanted: the file is then read in many pieces, one after another.
        """
        if self._kept is None or self._kept[0] != file:
            self._kept = None  # what is held for another file goes first
            self._kept = file, make()
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @abstractmethod
    def find(self) -> list[str]:
        """Return the paths of the files, in reading order."""

    @abstractmethod
    def inspect_file(self, path: str) -> SequencePlan:
        """Return the plan of one file's episodes.

        Raises:
            DataError: when the file cannot be used.
        """

    def inspect(self, without: Mapping[str, str] | None = None) -> SequencePlan:
        """Inspect every file; leave out those that cannot be used, or say which it is that cannot."""
        if not storage.exists(self.path):
            raise DataError(f"recording not found: {self.path}; {self.where_it_comes_from}")
        paths = self.find()
        if not paths:
            raise DataError(f"not a {self.format_name} recording: {self.path}: no file of that format; check format")
        plans: list[SequencePlan] = []
        skipped: dict[str, str] = {}
        for path in paths:
            try:
                plan = self.inspect_file(path)
                if reason := (without or {}).get(plan.files[0].path):
                    raise DataError(reason)
            except DataError as error:
                if not self.skips_damaged:
                    raise
                skipped[storage.absolute(path)] = str(error)  # as `SourceFile.path` has it
            else:
                plans.append(plan)
        if self.skips_damaged:
            plans = _of_same_dims(plans, skipped)
        if not plans:
            first = next(iter(skipped.values()))
            raise DataError(f"no file is usable: all {len(skipped)} in {self.path}; the first: {first}")
        return check_transitions(join_plans(plans, skipped))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check an option that takes one of a few words.

    Raises:
        ConfigError: when it is another.
    """
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def plan_file(
    file: SourceFile,
    *,
    num_states: Index,
    num_actions: Index,
    dims: tuple[int, int],
    episode_index: Index | None = None,
    first_row: Index | None = None,
    given_split: Index | None = None,
    success: Index | None = None,
    drops: dict[str, int] | None = None,
    warnings: Iterable[str] = (),
    attributes: dict[str, str | float] | None = None,
) -> SequencePlan:
    """Return the plan of one file; see `SequencePlan` for the arguments."""
    numbers = np.arange(len(num_states)) if episode_index is None else episode_index
    return SequencePlan(
        files=(file,),
        file_index=np.zeros(len(num_states), dtype=np.int64),
        episode_index=np.asarray(numbers, dtype=np.int64),
        num_states=np.asarray(num_states, dtype=np.int64),
        num_actions=np.asarray(num_actions, dtype=np.int64),
        state_dim=dims[0],
        action_dim=dims[1],
        attributes=attributes or {},
        first_row=first_row,
        given_split=given_split,
        success=success,
        drops={reason: count for reason, count in (drops or {}).items() if count},
        warnings=tuple(warnings),
    )


def join_plans(plans: Sequence[SequencePlan], skipped: dict[str, str]) -> SequencePlan:
    """Join the plans of files, in order, into that of the recording.

    Raises:
        DataError: when the files' dimensions differ.
    """
    first = plans[0]
    for plan in plans:
        if plan.dims != first.dims:
            raise _other_dims(first, plan)
    drops: dict[str, int] = {}
    for plan in plans:
        for reason, count in plan.drops.items():
            drops[reason] = drops.get(reason, 0) + count
    warnings = [line for plan in plans for line in plan.warnings]
    if len(warnings) > MAX_WARNINGS:
        warnings[MAX_WARNINGS:] = [f"... and {len(warnings) - MAX_WARNINGS} more warnings"]
    return SequencePlan(
        files=tuple(plan.files[0] for plan in plans),
        file_index=np.repeat(np.arange(len(plans)), [plan.num_episodes for plan in plans]),
        state_dim=first.state_dim,
        action_dim=first.action_dim,
        attributes=first.attributes,
        drops=drops,
        warnings=tuple(warnings),
        skipped=skipped,
        **{name: _join_column(plans, name) for name in EPISODE_COLUMNS},  # type: ignore[arg-type]
    )


def check_transitions(plan: SequencePlan) -> SequencePlan:
    """Return the plan when it holds an episode with two states and an action between them.

    Raises:
        DataError: when it holds none.
    """
    where = plan.files[0].path if len(plan.files) == 1 else f"{len(plan.files)} files, the first {plan.files[0].path}"
    if plan.num_episodes == 0:
        raise DataError(f"a recording must hold at least one episode, found none: {where}; check buffer_path")
    if not (np.minimum(plan.num_states - 1, plan.num_actions) > 0).any():
        raise DataError(
            f"a recording must hold at least one transition, found none: {where}: the longest of {plan.num_episodes} "
            f"episodes has {plan.num_states.max()} states and {plan.num_actions.max()} actions"
        )
    return plan


def changed(path: str) -> DataError:
    """Return the error for a file that no longer holds what the plan says."""
    return DataError(f"recording changed while it was read: {path}; run the command again")


def _of_same_dims(plans: Sequence[SequencePlan], skipped: dict[str, str]) -> list[SequencePlan]:
    """Return the plans of the files with the dimensions that most have; add the others to `skipped`."""
    if not plans:
        return []
    usual = Counter(plan.dims for plan in plans).most_common(1)[0][0]
    first = next(plan for plan in plans if plan.dims == usual)
    skipped |= {plan.files[0].path: str(_other_dims(first, plan)) for plan in plans if plan.dims != usual}
    return [plan for plan in plans if plan.dims == usual]


def _other_dims(first: SequencePlan, other: SequencePlan) -> DataError:
    return DataError(
        f"all files must have the same dimensions: {first.files[0].path} has state, action {first.dims}, "
        f"{other.files[0].path} has {other.dims}; set shape_meta, or keep them apart"
    )


def _join_column(plans: Sequence[SequencePlan], name: str) -> Index | None:
    columns = [getattr(plan, name) for plan in plans]
    if all(column is None for column in columns):
        return None
    filled = [
        np.full(plan.num_episodes, -1, dtype=np.int64) if column is None else column
        for plan, column in zip(plans, columns, strict=True)
    ]
    return np.concatenate(filled)
