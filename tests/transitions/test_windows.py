from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invdyn.sequences.base import EpisodeArrays
from invdyn.transitions.store import COLUMNS
from invdyn.transitions.windows import Window, make_transitions, ranges
from tests.sequences.recordings import make_episodes
from tests.transitions.reference import reference_rows

windows = st.builds(Window, gap=st.integers(1, 4), horizon=st.integers(1, 4), history=st.integers(0, 3))


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5)), max_size=8))
def test_ranges(pairs: list[tuple[int, int]]) -> None:
    starts, lengths = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    assert ranges(starts, lengths).tolist() == [start + i for start, length in pairs for i in range(length)]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    window=windows,
    states_after=st.integers(0, 1),
    dtype=st.sampled_from([np.float32, np.float64, np.int32]),
    data=st.data(),
)
def test_rows_and_drops_equal_the_reference(
    lengths: list[int], window: Window, states_after: int, dtype: type, data: st.DataObject
) -> None:
    episodes = make_episodes(lengths, states_after=states_after, dtype=dtype)
    num_actions = np.array(lengths)
    num_states = num_actions + states_after
    limit = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths))))
    arrays = EpisodeArrays(np.concatenate([s for s, _ in episodes]), np.concatenate([a for _, a in episodes]))
    expected = [
        row
        for number, episode in enumerate(episodes)
        for row in list(reference_rows({number + 5: episode}, window))[: limit[number]]
    ]

    rows = make_transitions(arrays, window, num_states, num_actions, limit, first_episode=5)

    assert len(rows) == len(expected)
    for column, values in zip(COLUMNS, zip(*expected, strict=True), strict=False):
        found = getattr(rows, column)
        assert found.dtype == (np.int64 if column in ("episode", "step") else np.float32)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, np.array(values, dtype=found.dtype))
    all_rows = list(reference_rows(dict(enumerate(episodes)), window))
    assert window.num_rows(num_states, num_actions).sum() == len(all_rows)
    drops = window.count_drops(num_states, num_actions)
    assert min(drops.values()) >= 0
    assert sum(drops.values()) + len(all_rows) == num_actions.sum()


@pytest.mark.parametrize(
    ("window", "drops"),
    [
        (Window(), (0, 0, 0)),
        (Window(gap=3), (2, 0, 0)),
        (Window(horizon=3), (0, 2, 0)),
        (Window(history=3), (0, 0, 3)),
        (Window(gap=2, horizon=3, history=1), (1, 1, 1)),
        (Window(gap=99), (10, 0, 0)),
        (Window(history=99), (0, 0, 10)),
    ],
)
def test_drops_of_one_episode_of_ten_actions(window: Window, drops: tuple[int, int, int]) -> None:
    found = window.count_drops(np.array([11]), np.array([10]))
    assert found == dict(zip(("no_next_state", "no_horizon", "no_history"), drops, strict=True))
