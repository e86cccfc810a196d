"""The meaning of extraction, written for clarity: one step at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from invdyn.transitions.windows import Window
from tests.sequences.recordings import Episode

Row = tuple[np.ndarray, np.ndarray, np.ndarray, int, int]


def reference_rows(episodes: dict[int, Episode], window: Window) -> Iterator[Row]:
    """Yield (state, action, next_state, episode, step) of all transitions of some episodes, by their numbers."""
    for number, (states, actions) in episodes.items():
        for t in range(len(actions)):
            if t >= window.history and t + window.gap < len(states) and t + window.horizon <= len(actions):
                state = states[t - window.history : t + 1].reshape(-1)
                action = actions[t : t + window.horizon] if window.horizon > 1 else actions[t]
                yield state, action, states[t + window.gap], number, t
