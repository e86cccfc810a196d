from __future__ import annotations

import numpy as np
import pytest

from invdyn.doctor.findings import ERROR, WARNING
from invdyn.doctor.leakage import check_leakage, equal_shares
from invdyn.transitions.windows import Window
from tests.doctor.recordings import NAMES, record, sample


def with_column(states, column):
    return [np.concatenate([s, c[:, None]], axis=1) for s, c in zip(states, column, strict=True)]


def test_clean_recording_has_no_finding():
    assert check_leakage(sample(*record()), Window(), NAMES) == []


def test_the_rows_own_action_in_the_state():
    states, actions = record()
    leaked = with_column(states, [np.append(a[:, 1], 0.0) for a in actions])
    (found,) = check_leakage(sample(leaked, actions), Window(), NAMES)
    assert (found.check, found.severity) == ("leak_current", ERROR)
    assert (found.figures["state_dims"], found.figures["action_dims"]) == ([4], [1])
    assert "shape_meta.obs" in found.fix


def test_the_previous_action_in_the_state():
    states, actions = record()
    leaked = with_column(states, [np.append(0.0, a[:, 0]) for a in actions])
    (found,) = check_leakage(sample(leaked, actions), Window(), NAMES)
    assert (found.check, found.severity) == ("leak_next", ERROR)
    assert (found.figures["state_dims"], found.figures["action_dims"]) == ([4], [0])


@pytest.mark.parametrize(
    ("late", "window", "title"),
    [
        (1, Window(gap=2), None),  # s_t and s_{t+2} hold a_{t-1} and a_{t+1}
        (2, Window(gap=2), "2 rows before"),
        (2, Window(gap=3), None),
        (2, Window(gap=3, horizon=2), "2 rows before"),  # s_{t+3} holds a_{t+1}
        (1, Window(gap=1, horizon=2, history=2), "the row before"),
        (-1, Window(), None),
        (-1, Window(history=1), "the row after"),  # s_{t-1} holds a_t
        (-2, Window(horizon=3), "2 rows after"),  # s_t holds a_{t+2}
    ],
)
def test_only_actions_of_the_row_leak(late, window, title):
    """The state at t holds the action of t - late."""
    states, actions = record()
    around = [np.pad(a[:, 0], 3) for a in actions]
    leaked = with_column(states, [values[3 - late : 64 - late] for values in around])
    found = check_leakage(sample(leaked, actions), window, NAMES)
    assert [(f.severity, f.title.split(" holds the action of ")[1]) for f in found] == [(ERROR, title)] * bool(title)


def test_float32_rounding_and_scaling_do_not_hide_it():
    states, actions = record()
    rounded = with_column(states, [np.append(a[:, 1].astype(np.float32), 0.0) for a in actions])
    assert [f.check for f in check_leakage(sample(rounded, actions), Window(), NAMES)] == ["leak_current"]
    scaled = with_column(states, [np.append(-3.0 * a[:, 1] + 2.0, 0.0) for a in actions])
    (found,) = check_leakage(sample(scaled, actions), Window(), NAMES)
    assert "fixed multiple" in found.title
    assert found.figures["state_dims"] == [4]


def test_a_leak_in_most_rows_is_a_warning():
    states, actions = record()
    column = [np.append(a[:, 1], 0.0) for a in actions]
    for values in column:
        values[:18] = 0.0  # 18 of 60 steps
    (found,) = check_leakage(sample(with_column(states, column), actions), Window(), NAMES)
    assert found.severity == WARNING
    assert found.figures["shares"] == [pytest.approx(0.7)]


def test_two_columns_at_rest_are_no_leak():
    action = np.zeros((100, 1))
    action[:5, 0] = np.arange(1, 6)
    state = np.zeros((100, 1))
    assert equal_shares(state, action).tolist() == [[0.0]]
