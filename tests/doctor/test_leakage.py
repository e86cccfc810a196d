from __future__ import annotations

import numpy as np
import pytest

from invdyn.doctor.findings import ERROR, WARNING
from invdyn.doctor.leakage import check_leakage, equal_shares
from tests.doctor.recordings import NAMES, record, sample


def with_column(states, column):
    return [np.concatenate([s, c[:, None]], axis=1) for s, c in zip(states, column, strict=True)]


def test_clean_recording_has_no_finding():
    assert check_leakage(sample(*record()), NAMES) == []


def test_the_rows_own_action_in_the_state():
    states, actions = record()
    leaked = with_column(states, [np.append(a[:, 1], 0.0) for a in actions])
    (found,) = check_leakage(sample(leaked, actions), NAMES)
    assert (found.check, found.severity) == ("leak_current", ERROR)
    assert (found.figures["state_dims"], found.figures["action_dims"]) == ([4], [1])
    assert "shape_meta.obs" in found.fix


def test_the_previous_action_in_the_state():
    states, actions = record()
    leaked = with_column(states, [np.append(0.0, a[:, 0]) for a in actions])
    (found,) = check_leakage(sample(leaked, actions), NAMES)
    assert (found.check, found.severity) == ("leak_next", ERROR)
    assert (found.figures["state_dims"], found.figures["action_dims"]) == ([4], [0])


def test_float32_rounding_and_scaling_do_not_hide_it():
    states, actions = record()
    rounded = with_column(states, [np.append(a[:, 1].astype(np.float32), 0.0) for a in actions])
    assert [f.check for f in check_leakage(sample(rounded, actions), NAMES)] == ["leak_current"]
    scaled = with_column(states, [np.append(-3.0 * a[:, 1] + 2.0, 0.0) for a in actions])
    (found,) = check_leakage(sample(scaled, actions), NAMES)
    assert "fixed multiple" in found.title
    assert found.figures["state_dims"] == [4]


def test_a_leak_in_most_rows_is_a_warning():
    states, actions = record()
    column = [np.append(a[:, 1], 0.0) for a in actions]
    for values in column:
        values[:18] = 0.0  # 18 of 60 steps
    (found,) = check_leakage(sample(with_column(states, column), actions), NAMES)
    assert found.severity == WARNING
    assert found.figures["shares"] == [pytest.approx(0.7)]


def test_two_columns_at_rest_are_no_leak():
    action = np.zeros((100, 1))
    action[:5, 0] = np.arange(1, 6)
    state = np.zeros((100, 1))
    assert equal_shares(state, action).tolist() == [[0.0]]
