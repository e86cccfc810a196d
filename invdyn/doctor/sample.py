"""The episodes that the doctor looks at: all of a small recording, evenly spaced ones of a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from invdyn.doctor.findings import MAX_PLACES, Place
from invdyn.errors import DataError
from invdyn.sequences.base import SequencePlan, SequenceReader, SourceFile
from invdyn.transitions.plan import TRAIN, VAL
from invdyn.transitions.scan import evenly_spaced
from invdyn.transitions.windows import ranges

PerEpisode = Int[np.ndarray, "episodes"]
FloatRows = Float[np.ndarray, "rows dim"]


@dataclass(frozen=True)
class Sample:
    """Whole episodes, laid end to end.

    Attributes:
        state: (sum of num_states, state_dim) float64.
        action: (sum of num_actions, action_dim) float64.
        plan: what the recording says about these episodes alone.
        split: (episodes,) index into `SPLITS`.
        number: (episodes,) number of each episode in the whole recording.
    """

    state: FloatRows
    action: FloatRows
    plan: SequencePlan
    split: PerEpisode
    number: PerEpisode

    @classmethod
    def of_episodes(
        cls, states: Sequence[FloatRows], actions: Sequence[FloatRows], split: Sequence[int] | None = None
    ) -> Sample:
        """Wrap arrays that come from no file: one (T + 1, state_dim) and one (T, action_dim) per episode."""
        plan = SequencePlan(
            files=(SourceFile(path="recording", name="recording", size=0, version=0),),
            file_index=np.zeros(len(states), np.int64),
            episode_index=np.arange(len(states)),
            num_states=np.array([len(state) for state in states]),
            num_actions=np.array([len(action) for action in actions]),
            state_dim=states[0].shape[1],
            action_dim=actions[0].shape[1],
            attributes={},
        )
        state, action = (np.concatenate(values).astype(np.float64) for values in (states, actions))
        given = np.full(len(states), TRAIN) if split is None else np.array(split, np.int64)
        return cls(state, action, plan, given, np.arange(len(states)))

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.split)

    @property
    def num_states(self) -> PerEpisode:
        """States of each episode."""
        return self.plan.num_states

    @property
    def num_actions(self) -> PerEpisode:
        """Actions of each episode."""
        return self.plan.num_actions

    @cached_property
    def state_start(self) -> PerEpisode:
        """Row of each episode's first state."""
        start: PerEpisode = np.cumsum(self.num_states) - self.num_states
        return start

    @cached_property
    def action_start(self) -> PerEpisode:
        """Row of each episode's first action."""
        start: PerEpisode = np.cumsum(self.num_actions) - self.num_actions
        return start

    @cached_property
    def steps(self) -> Steps:
        """All steps from a recorded state by a recorded action to a recorded state."""
        counts = np.minimum(self.num_actions, self.num_states - 1)
        return Steps(
            state_row=ranges(self.state_start, counts),
            action_row=ranges(self.action_start, counts),
            episode=np.repeat(np.arange(self.num_episodes), counts),
            step=ranges(np.zeros_like(counts), counts),
        )

    def places(self, steps: Int[np.ndarray, "found"]) -> tuple[Place, ...]:
        """Return where steps (indices into `steps`) lie, the first `MAX_PLACES`."""
        first = steps[:MAX_PLACES]
        return tuple(
            self.place(int(e), int(t)) for e, t in zip(self.steps.episode[first], self.steps.step[first], strict=True)
        )

    def place(self, episode: int, step: int) -> Place:
        """Return where a step of an episode (its position in this sample) lies."""
        plan = self.plan
        row = None if plan.first_row is None else int(plan.first_row[episode]) + step
        return Place(plan.files[plan.file_index[episode]].name, int(plan.episode_index[episode]), step, row)

    def select(self, keep: Bool[np.ndarray, "episodes"]) -> Sample:
        """Return the kept episodes alone."""
        return Sample(
            self.state[np.repeat(keep, self.num_states)],
            self.action[np.repeat(keep, self.num_actions)],
            select_episodes_of(self.plan, np.flatnonzero(keep)),
            self.split[keep],
            self.number[keep],
        )

    def cut_at(self, steps: Int[np.ndarray, "cuts"]) -> Sample:
        """Return the same rows with the episodes cut in two at each of `steps`, so that no row crosses them."""
        last = np.union1d(self.steps.state_row[steps], self.state_start + self.num_states - 1)
        episode = np.searchsorted(self.state_start, last, side="right") - 1
        num_states = np.diff(last, prepend=-1)
        # The action of a cut step stays in its piece, where no state follows it.
        whole = last == (self.state_start + self.num_states - 1)[episode]
        num_actions = num_states - whole * (self.num_states - self.num_actions)[episode]
        plan = replace(
            select_episodes_of(self.plan, episode), num_states=num_states, num_actions=num_actions, first_row=None
        )
        return Sample(self.state, self.action, plan, self.split[episode], self.number[episode])

    def __repr__(self) -> str:
        return f"Sample({self.num_episodes} episodes, state {self.state.shape}, action {self.action.shape})"


@dataclass(frozen=True)
class Steps:
    """Steps t -> t + 1 of a sample, in order; all (steps,) int64.

    Attributes:
        state_row: row of the state before; the state after is the next row.
        action_row: row of the action.
        episode: position of the episode in the sample.
        step: t.
    """

    state_row: Int[np.ndarray, "steps"]
    action_row: Int[np.ndarray, "steps"]
    episode: Int[np.ndarray, "steps"]
    step: Int[np.ndarray, "steps"]

    def __len__(self) -> int:
        return len(self.state_row)


def choose_episodes(num_states: PerEpisode, split: PerEpisode, max_rows: int) -> Int[np.ndarray, "chosen"]:
    """Choose episodes of about `max_rows` states in all: all, or evenly spaced ones; at least two, one for validation.

    Example:
        >>> choose_episodes(np.full(6, 10), np.array([0, 0, 1, 0, 0, 0]), max_rows=30).tolist()
        [0, 2, 5]
    """
    chosen = evenly_spaced(num_states, max_rows)
    if (split == VAL).any() and not (split[chosen] == VAL).any():
        chosen = np.union1d(chosen, np.flatnonzero(split == VAL)[:1])
    return chosen


def read_sample(
    reader: SequenceReader,
    plan: SequencePlan,
    split: PerEpisode,
    max_rows: int,
    keep: Bool[np.ndarray, "episodes"] | None = None,
) -> tuple[Sample, dict[str, str]]:
    """Read the chosen episodes, neighbours within a file together.

    Args:
        reader: reads the recording.
        plan: of all episodes.
        split: (episodes,) index into `SPLITS`.
        max_rows: states to read, about.
        keep: (episodes,) which ones to choose from; all when None.

    Returns:
        The sample, and the files that could not be read with the reason.

    Raises:
        DataError: when no file can be read.
    """
    kept = np.arange(plan.num_episodes) if keep is None else np.flatnonzero(keep)
    chosen = kept[choose_episodes(plan.num_states[kept], split[kept], max_rows)]
    cuts = np.flatnonzero((np.diff(chosen) != 1) | (np.diff(plan.file_index[chosen]) != 0)) + 1
    read, numbers, failed = [], [], {}
    for run in np.split(chosen, cuts):
        file = plan.files[plan.file_index[run[0]]]
        if file.name in failed:
            continue
        try:
            read.append(reader.read(plan.slice(int(run[0]), int(run[-1]) + 1)))
        except DataError as error:
            failed[file.name] = str(error)
        else:
            numbers.append(run)
    if not read:
        raise DataError(next(iter(failed.values())))
    number = np.concatenate(numbers)
    state, action = (
        np.concatenate([np.asarray(getattr(arrays, name), np.float64) for arrays in read])
        for name in ("state", "action")
    )
    return Sample(state, action, select_episodes_of(plan, number), split[number], number), failed


def select_episodes_of(plan: SequencePlan, chosen: Int[np.ndarray, "chosen"]) -> SequencePlan:
    """Return the plan of the chosen episodes alone; the files stay as they are."""
    columns = ("file_index", "episode_index", "num_states", "num_actions", "first_row", "given_split", "success")
    values = {name: getattr(plan, name) for name in columns}
    return replace(plan, **{name: value[chosen] for name, value in values.items() if value is not None})
