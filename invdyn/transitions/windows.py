"""Index math: which rows of flat episode arrays make which transitions. No loop over steps or episodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Num

from invdyn.sequences.base import EpisodeArrays

Counts = Int[np.ndarray, "episodes"]


@dataclass(frozen=True)
class Window:
    """What one row holds: states t - history .. t, actions t .. t + horizon - 1, next state t + gap."""

    gap: int = 1
    horizon: int = 1
    history: int = 0

    def num_rows(self, num_states: Counts, num_actions: Counts) -> Counts:
        """Return how many rows each episode gives, (episodes,)."""
        last = np.minimum(num_states - self.gap, num_actions - self.horizon + 1)
        rows: np.ndarray = np.maximum(last - self.history, 0)
        return rows

    def count_drops(self, num_states: Counts, num_actions: Counts) -> dict[str, int]:
        """Return how many actions start no row, by reason; with `num_rows` they add up to all actions.

        Reasons, in the order in which they are charged: `no_next_state` (no recorded state `gap` steps later),
        `no_horizon` (fewer than `horizon` actions left), `no_history` (fewer than `history` states before).
        """
        with_next = np.clip(num_states - self.gap, 0, num_actions)
        with_horizon = np.clip(num_actions - self.horizon + 1, 0, with_next)
        return {
            "no_next_state": int((num_actions - with_next).sum()),
            "no_horizon": int((with_next - with_horizon).sum()),
            "no_history": int(np.minimum(with_horizon, self.history).sum()),
        }


@dataclass(frozen=True)
class Transitions:
    """Rows (s, a, s').

    Attributes:
        state: (rows, (history + 1) * state_dim) float32, oldest first.
        action: (rows, action_dim) float32, or (rows, horizon, action_dim) when horizon > 1.
        next_state: (rows, state_dim) float32.
        episode: (rows,) int64, the episode's number in the whole recording.
        step: (rows,) int64, t within the episode.
    """

    state: Num[np.ndarray, "rows window_dim"]
    action: Num[np.ndarray, "rows ..."]
    next_state: Num[np.ndarray, "rows state_dim"]
    episode: Int[np.ndarray, "rows"]
    step: Int[np.ndarray, "rows"]

    def __len__(self) -> int:
        return len(self.state)

    def __repr__(self) -> str:
        shapes = f"state {self.state.shape}, action {self.action.shape}, next_state {self.next_state.shape}"
        return f"Transitions({len(self)} rows, {shapes})"


def ranges(starts: Counts, lengths: Counts) -> Int[np.ndarray, "total"]:
    """Return the numbers starts[i] .. starts[i] + lengths[i] - 1 for all i, end to end.

    Example:
        >>> ranges(np.array([0, 10]), np.array([2, 3])).tolist()
        [0, 1, 10, 11, 12]
    """
    ends = np.cumsum(lengths)
    numbers: np.ndarray = np.arange(ends[-1] if len(ends) else 0)
    numbers += np.repeat(starts - (ends - lengths), lengths)
    return numbers


def make_transitions(
    arrays: EpisodeArrays,
    window: Window,
    num_states: Counts,
    num_actions: Counts,
    row_limit: Counts,
    first_episode: int,
    first_step: Counts | None = None,
) -> Transitions:
    """Cut episodes that lie end to end into transitions.

    Args:
        arrays: the episodes.
        window: what a row holds.
        num_states: states of each episode.
        num_actions: actions of each episode.
        row_limit: rows wanted of each episode, from its start; at most what the window gives.
        first_episode: number of the first episode in the whole recording.
        first_step: (episodes,) step of the first state given of each episode; 0 when None.

    Returns:
        The rows in episode and step order.
    """
    rows = np.minimum(row_limit, window.num_rows(num_states, num_actions))
    return gather_rows(arrays, window, index_rows(window, num_states, num_actions, rows, first_episode, first_step))


@dataclass(frozen=True)
class RowIndex:
    """Where rows lie in episodes end to end.

    Attributes:
        state: (rows,) index of the current state.
        action: (rows,) index of the first action.
        episode: (rows,) as in `Transitions`.
        step: (rows,) as in `Transitions`.
    """

    state: Int[np.ndarray, "rows"]
    action: Int[np.ndarray, "rows"]
    episode: Int[np.ndarray, "rows"]
    step: Int[np.ndarray, "rows"]

    def take(self, chosen: Bool[np.ndarray, "rows"]) -> RowIndex:
        """Return the rows that are set."""
        index = np.flatnonzero(chosen)
        if len(index) == len(chosen):
            return self
        return RowIndex(*(values.take(index) for values in (self.state, self.action, self.episode, self.step)))


def index_rows(
    window: Window,
    num_states: Counts,
    num_actions: Counts,
    rows: Counts,
    first_episode: int,
    first_step: Counts | None = None,
) -> RowIndex:
    """Return where the first `rows` rows of each episode lie; arguments as in `make_transitions`."""
    state_starts = np.cumsum(num_states) - num_states
    action_starts = np.cumsum(num_actions) - num_actions
    before = np.cumsum(rows) - rows
    # Counted from the first row of all, every column is a number per episode plus the row's own number.
    number = np.arange(int(rows.sum()))
    numbers = np.arange(first_episode, first_episode + len(rows))
    starts = (state_starts, action_starts, 0 if first_step is None else first_step)
    state, action, step = (number + np.repeat(start + window.history - before, rows) for start in starts)
    return RowIndex(state, action, np.repeat(numbers, rows), step)


def gather_rows(arrays: EpisodeArrays, window: Window, index: RowIndex) -> Transitions:
    """Cut rows out of episodes that lie end to end."""
    window_dim = (window.history + 1) * arrays.state.shape[1]
    past = _gather(arrays.state, index.state, np.arange(-window.history, 1))
    return Transitions(
        state=past.reshape(len(past), window_dim),
        action=_gather(arrays.action, index.action, np.arange(window.horizon)),
        next_state=_gather(arrays.state, index.state, np.array([window.gap])),
        episode=index.episode,
        step=index.step,
    )


def _gather(
    values: Num[np.ndarray, "items dim"], index: Int[np.ndarray, "rows"], offsets: Int[np.ndarray, "offsets"]
) -> Num[np.ndarray, "rows ..."]:
    """Return values[index + offset] as float32: (rows, dim) for one offset, else (rows, offsets, dim)."""
    if len(offsets) == 1:
        offset = int(offsets[0])
        if len(index) and index[-1] - index[0] == len(index) - 1:
            return np.ascontiguousarray(values[index[0] + offset : index[-1] + offset + 1], dtype=np.float32)
        return values.take(index + offset, axis=0).astype(np.float32, copy=False)
    gathered: np.ndarray = values.take(index[:, None] + offsets, axis=0)
    return gathered.astype(np.float32, copy=False)
