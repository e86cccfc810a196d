"""Filters of recorded data: which episodes and rows are left out, which actions are clipped, which dims leave the rows.

Pure functions of arrays; the doctor measures with the same ones. Every action that starts no row because of a filter is
counted under one reason, the first that applies in the order of `EPISODE_REASONS`, then `ROW_REASONS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from pydantic import Field, model_validator

from invdyn.config import Config, nearest
from invdyn.errors import DataError
from invdyn.sequences.base import EpisodeArrays, SequencePlan
from invdyn.transitions.windows import Window, ranges

NOT_INCLUDED, EXCLUDED, NOT_SUCCESSFUL, SHORT = "not_included", "excluded", "not_successful", "short_episode"
EPISODE_REASONS = (NOT_INCLUDED, EXCLUDED, NOT_SUCCESSFUL, SHORT)
STALE, JUMP, SATURATED = "stale", "jump", "saturated_action"
ROW_REASONS = (STALE, JUMP, SATURATED)

FEW_VALUES = 16
"""A column with fewer distinct values is a switch, not a continuous quantity that saturates."""

VARYING_STD = 1e-7
"""Standard deviation relative to the largest value below which a state dimension does not vary."""

FloatRows = Float[np.ndarray, "rows dim"]
PerDim = Float[np.ndarray, "dim"]
Counts = Int[np.ndarray, "episodes"]
Mask = Bool[np.ndarray, "rows"]
Bound = float | tuple[float, ...]
DimValue = tuple[int, float]


class EpisodeFilter(Config):
    """Episodes by `SequencePlan.episode_id`: file name and number within it, such as `shard-00000.hdf5:3`.

    Attributes:
        include: the only episodes to take; all when None.
        exclude: episodes to leave out.
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()


class FiltersConfig(Config):
    """What is left out of a dataset; all off by default.

    Attributes:
        drop_stale: leave out rows whose next state equals their state, whatever the action.
        drop_jumps: leave out rows that span a step larger than this many times the typical step.
        saturated_actions: "drop" to leave out rows with an action at a bound, "clip" to clip actions to the bounds.
        action_bounds: [low, high], each a number or one per action dimension; for "drop" the extremes found when None.
        drop_constant_dims: leave dimensions of state and action out of the rows that hold one value everywhere.
        success_only: leave out episodes that the recording does not call successful.
        episodes: lists of episodes.
        min_length: actions that an episode must hold.
    """

    drop_stale: bool = False
    drop_jumps: Annotated[float, Field(gt=0)] | None = None
    saturated_actions: Literal["keep", "drop", "clip"] = "keep"
    action_bounds: tuple[Bound, Bound] | None = None
    drop_constant_dims: bool = False
    success_only: bool = False
    episodes: EpisodeFilter = EpisodeFilter()
    min_length: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check_bounds(self) -> FiltersConfig:
        if self.action_bounds is None:
            if self.saturated_actions == "clip":
                raise ValueError("saturated_actions: clip needs action_bounds: [low, high]")
            return self
        if self.saturated_actions == "keep":
            raise ValueError("action_bounds needs saturated_actions: drop or clip")
        sides = [np.atleast_1d(np.array(side, dtype=np.float64)) for side in self.action_bounds]
        if len({len(side) for side in sides} - {1}) > 1 or min(map(len, sides)) == 0:
            raise ValueError("action_bounds must be two numbers, or two lists with one number per action dimension")
        if not np.all(sides[0] < sides[1]):
            raise ValueError("action_bounds must be [low, high] with low below high")
        return self

    @property
    def drops_rows(self) -> bool:
        """Whether single rows may be left out, so that the recording must be read before it is planned."""
        return self.drop_stale or self.drop_jumps is not None or self.saturated_actions == "drop"

    @property
    def needs_scan(self) -> bool:
        """Whether the arrays must be looked at before the extraction can be planned."""
        return self.drops_rows or self.drop_constant_dims

    @property
    def finds_bounds(self) -> bool:
        """Whether the bounds of the actions are the extremes found."""
        return self.saturated_actions == "drop" and self.action_bounds is None


class ConstantDims(Config):
    """Dimensions that leave the rows because they hold one value in the whole recording.

    Attributes:
        state: (dimension of the recorded state, value), by dimension.
        action: likewise of the action.
    """

    state: tuple[DimValue, ...] = ()
    action: tuple[DimValue, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """Bounds of the actions.

    Attributes:
        low: (action_dim,) float32; -inf where there is none.
        high: (action_dim,) float32; inf where there is none.
    """

    low: Num[np.ndarray, "action_dim"]
    high: Num[np.ndarray, "action_dim"]


@dataclass(frozen=True)
class JumpScale:
    """How large a step is, and from where on it jumps.

    Attributes:
        scale: (state_dim,) standard deviation of each dimension; infinite where it does not vary.
        typical: median size of the steps that move; see `step_sizes`.
        multiple: sizes above `multiple * typical` jump.
    """

    scale: PerDim
    typical: float
    multiple: float


@dataclass(frozen=True)
class RowFilter:
    """All that a task needs to filter rows; by default nothing is done.

    Attributes:
        drop_stale: leave out rows whose next state equals their state.
        jumps: leave out rows that span a jump.
        drop_at: leave out rows with an action at or beyond these bounds.
        clip_to: clip actions to these bounds.
        state_dims: dimensions of the recorded state that stay; all when None.
        action_dims: likewise of the action.
    """

    drop_stale: bool = False
    jumps: JumpScale | None = None
    drop_at: Bounds | None = None
    clip_to: Bounds | None = None
    state_dims: Int[np.ndarray, "kept"] | None = None
    action_dims: Int[np.ndarray, "kept"] | None = None

    @property
    def drops_rows(self) -> bool:
        """Whether single rows may be left out."""
        return self.drop_stale or self.jumps is not None or self.drop_at is not None

    def without_dims(self, constant: ConstantDims, state_dim: int, action_dim: int) -> RowFilter:
        """Return this filter with constant dimensions leaving the rows.

        Raises:
            DataError: when no dimension of state or action would be left.
        """
        kept = {}
        for name, dim, values in (("state", state_dim, constant.state), ("action", action_dim, constant.action)):
            kept[name] = np.setdiff1d(np.arange(dim), [index for index, _ in values])
            if not len(kept[name]):
                raise DataError(
                    f"one {name} dimension at least must vary: all {dim} are constant; record what moves, or "
                    "set filters: {drop_constant_dims: false}"
                )
        return replace(self, state_dims=kept["state"], action_dims=kept["action"])


def select_episodes(filters: FiltersConfig, sequences: SequencePlan) -> dict[str, Bool[np.ndarray, "episodes"]]:
    """Return which episodes are left out, by reason; no episode is under two reasons.

    Raises:
        DataError: when a listed episode does not exist, or the recording does not say which episodes succeeded.
    """
    found: dict[str, Bool[np.ndarray, "episodes"]] = {}
    lists = filters.episodes
    if lists.include is not None or lists.exclude:
        names = np.array([sequences.episode_id(episode) for episode in range(sequences.num_episodes)])
        _check_listed(names, "include", lists.include or (), sequences.skipped)
        _check_listed(names, "exclude", lists.exclude, sequences.skipped)
        if lists.include is not None:
            found[NOT_INCLUDED] = ~np.isin(names, lists.include)
        if lists.exclude:
            found[EXCLUDED] = np.isin(names, lists.exclude)
    if filters.success_only:
        if sequences.success is None or not (sequences.success >= 0).any():
            raise DataError(
                "filters: success_only needs a recording that says which episodes succeeded; this one does not; set it "
                "to false"
            )
        found[NOT_SUCCESSFUL] = sequences.success != 1
    if filters.min_length > 1:
        found[SHORT] = sequences.num_actions < filters.min_length
    return disjoint(found)


def _check_listed(names: np.ndarray, key: str, listed: Sequence[str], skipped: Collection[str]) -> None:
    known = names.tolist()
    known_set = set(known)
    unknown = [name for name in listed if name not in known_set and not _is_in(name, skipped)]
    if unknown:
        hint = nearest(unknown[0], known[:1000])
        if not hint.startswith("did"):
            hint = f"the first of {len(known)} is {known[0]!r}"
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"filters: episodes: {key} must name episodes of the recording; {unknown[0]!r} is none{more}; {hint}"
        )


def _is_in(name: str, paths: Collection[str]) -> bool:
    """Return whether the file that an episode's name begins with is one of `paths`."""
    return any(f"/{path}".endswith(f"/{name.rpartition(':')[0]}") for path in paths)


def disjoint(masks: Mapping[str, Bool[np.ndarray, "..."]]) -> dict[str, Bool[np.ndarray, "..."]]:
    """Return the masks with each place left only in the first that holds it.

    Example:
        >>> masks = disjoint({"a": np.array([True, False]), "b": np.array([True, True])})
        >>> masks["b"].tolist()
        [False, True]
    """
    result: dict[str, Bool[np.ndarray, "..."]] = {}
    for reason, mask in masks.items():
        before = np.logical_or.reduce(list(result.values())) if result else np.zeros_like(mask)
        result[reason] = mask & ~before
    return result


def drop_masks(
    row_filter: RowFilter, arrays: EpisodeArrays, window: Window, num_states: Counts, num_actions: Counts
) -> dict[str, Mask]:
    """Return which of the rows that a window cuts are left out, by reason; no row is under two.

    Args:
        row_filter: the filters.
        arrays: episodes end to end, as they are stored (float32), with all recorded dimensions.
        window: what a row holds.
        num_states: (episodes,) states of each episode.
        num_actions: (episodes,) actions of each episode.

    Returns:
        Reason to (rows,) mask, in episode and step order.
    """
    rows = window.num_rows(num_states, num_actions)
    state_start = np.cumsum(num_states) - num_states
    now = ranges(state_start + window.history, rows)
    found: dict[str, Mask] = {}
    if row_filter.drop_stale:
        found[STALE] = (arrays.state[now] == arrays.state[now + window.gap]).all(axis=1)
    if row_filter.jumps is not None:
        last = np.repeat(state_start + num_states - 1, rows)
        stop = np.minimum(now + max(window.gap, window.horizon), last)
        found[JUMP] = _any_between(jumping_states(arrays.state, row_filter.jumps), now - window.history, stop)
    if row_filter.drop_at is not None:
        act = ranges(np.cumsum(num_actions) - num_actions + window.history, rows)
        found[SATURATED] = _any_between(at_bounds(arrays.action, row_filter.drop_at), act, act + window.horizon)
    return disjoint(found)


def _any_between(flags: Mask, first: Int[np.ndarray, "rows"], stop: Int[np.ndarray, "rows"]) -> Mask:
    """Return whether any of flags[first] .. flags[stop - 1] is set, for each pair."""
    before = np.concatenate([[0], np.cumsum(flags)])
    return np.asarray(before[stop] > before[first])


def jumping_states(state: Num[np.ndarray, "states dim"], jumps: JumpScale) -> Mask:
    """Return which states are followed by one that lies too far away; the last is not."""
    size = step_sizes(relative_steps(state, np.arange(max(len(state) - 1, 0)), jumps.scale))
    return np.append(size > jumps.multiple * jumps.typical, False)


def at_bounds(action: Num[np.ndarray, "actions dim"], bounds: Bounds) -> Mask:
    """Return which actions have a dimension at or beyond its bound."""
    return np.asarray(((action <= bounds.low) | (action >= bounds.high)).any(axis=1))


def count_clipped(
    bounds: Bounds, action: Num[np.ndarray, "actions dim"], first: Int[np.ndarray, "rows"], horizon: int
) -> int:
    """Return how many rows hold an action beyond the bounds; a row holds `horizon` actions from `first` on."""
    beyond = np.asarray(((action < bounds.low) | (action > bounds.high)).any(axis=1))
    return int(_any_between(beyond, first, first + horizon).sum())


def stored_arrays(row_filter: RowFilter, arrays: EpisodeArrays) -> EpisodeArrays:
    """Return the arrays that rows are cut from: actions clipped, constant dimensions left out."""
    state, action = arrays.state, arrays.action
    if row_filter.clip_to is not None:
        action = np.clip(action, row_filter.clip_to.low, row_filter.clip_to.high)
    if row_filter.state_dims is not None:
        state = state[:, row_filter.state_dims]
    if row_filter.action_dims is not None:
        action = action[:, row_filter.action_dims]
    return EpisodeArrays(state, action)


def first_of_each(kept: Mask, rows: Counts, limit: Counts) -> Mask:
    """Return the first `limit` kept rows of each episode.

    Args:
        kept: (rows,) which rows may be taken, episode after episode.
        rows: (episodes,) rows of each episode.
        limit: (episodes,) rows wanted of each.

    Example:
        >>> first_of_each(np.array([False, True, True, True]), np.array([3, 1]), np.array([1, 1])).tolist()
        [False, True, False, True]
    """
    before = np.concatenate([[0], np.cumsum(kept)])
    start = np.cumsum(rows) - rows
    rank = before[:-1] - np.repeat(before[start], rows)
    return np.asarray(kept & (rank < np.repeat(limit, rows)))


def count_per_episode(mask: Mask, rows: Counts) -> Counts:
    """Return how many rows of each episode are in a mask."""
    before = np.concatenate([[0], np.cumsum(mask)])
    ends = np.cumsum(rows)
    counts: Counts = before[ends] - before[ends - rows]
    return counts


def given_bounds(bounds: tuple[Bound, Bound], action_dim: int) -> Bounds:
    """Return the bounds of a config, as float32, for each action dimension.

    Raises:
        DataError: when there is not one per dimension.
    """
    sides = [np.atleast_1d(np.array(side, dtype=np.float32)) for side in bounds]
    for side in sides:
        if len(side) not in (1, action_dim):
            raise DataError(
                f"filters: action_bounds must hold a number, or one per action dimension ({action_dim}); got "
                f"{len(side)} of them"
            )
    low, high = (np.broadcast_to(side, action_dim).copy() for side in sides)
    return Bounds(low, high)


def stale_steps(state: Num[np.ndarray, "rows dim"], state_row: Int[np.ndarray, "steps"]) -> Mask:
    """Return which steps end in exactly the state that they started from."""
    return np.asarray((state[state_row] == state[state_row + 1]).all(axis=1))


def state_scale(state: FloatRows) -> PerDim:
    """Return the standard deviation of each dimension, infinite where it does not vary."""
    std = state.std(axis=0, dtype=np.float64)
    return np.where(std > VARYING_STD * np.abs(state).max(axis=0), std, np.inf)


def relative_steps(
    state: Num[np.ndarray, "rows dim"], state_row: Int[np.ndarray, "steps"], scale: PerDim | None = None
) -> Float[np.ndarray, "steps varying"]:
    """Return how far each step moves each varying dimension, in `scale`; in its standard deviation when None."""
    scale = state_scale(state) if scale is None else scale
    varying = np.isfinite(scale)
    scaled = state[:, varying] / scale[varying]
    moved: FloatRows = np.abs(scaled[state_row + 1] - scaled[state_row])
    return moved


def step_sizes(moved: Float[np.ndarray, "steps varying"]) -> Float[np.ndarray, "steps"]:
    """Return the size of each step: root mean square over the dimensions of `relative_steps`."""
    if not moved.shape[1]:
        return np.zeros(len(moved))
    sizes: Float[np.ndarray, "steps"] = np.sqrt(np.mean(moved**2, axis=1))
    return sizes


def typical_step(size: Float[np.ndarray, "steps"]) -> float:
    """Return the median size of the steps that move, infinite when none does: then nothing jumps."""
    return float(np.median(size[size > 0])) if (size > 0).any() else np.inf


def constant_columns(values: Num[np.ndarray, "rows dim"]) -> Bool[np.ndarray, "dim"]:
    """Return which columns hold one value in all rows."""
    return np.asarray(values.min(axis=0) == values.max(axis=0))


def describe(row_filter: RowFilter) -> dict[str, Any]:
    """Return what was measured for the filters, for the manifest."""
    facts: dict[str, Any] = {}
    if row_filter.jumps is not None:
        typical = row_filter.jumps.typical
        facts["typical_step"] = typical if np.isfinite(typical) else None
    bounds = row_filter.drop_at or row_filter.clip_to
    if bounds is not None:
        facts["action_bounds"] = [
            [float(value) if np.isfinite(value) else None for value in side] for side in (bounds.low, bounds.high)
        ]
    return facts
