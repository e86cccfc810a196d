from __future__ import annotations

import numpy as np
import pytest

from invdyn.doctor.findings import ERROR, INFO, Place
from invdyn.doctor.values import (
    bound_shares,
    check_constant,
    check_finite_values,
    check_saturated,
    near_constant_columns,
)
from invdyn.transitions.filters import constant_columns
from tests.doctor.recordings import NAMES, record, sample


def test_clean_recording_has_no_finding():
    clean = sample(*record())
    findings, episodes = check_finite_values(clean)
    assert findings == []
    assert episodes.all()
    assert check_constant(clean, NAMES) == []
    assert check_saturated(clean, NAMES) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_every_bad_value_is_found_where_it_is(bad):
    states, actions = record()
    states[3][7, 2] = bad
    states[5][0, 1] = bad
    actions[9][4, 1] = bad
    findings, clean = check_finite_values(sample(states, actions))
    assert [f.severity for f in findings] == [ERROR, ERROR]
    assert findings[0].places == (Place("recording", 3, 7), Place("recording", 5, 0))
    assert findings[0].figures["dims"] == [1, 2]
    assert findings[1].places == (Place("recording", 9, 4),)
    assert np.flatnonzero(~clean).tolist() == [3, 5, 9]


def test_constant_and_near_constant_columns():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(1000, 5))
    values[:, 1] = 7.0
    values[:, 2] = 7.0 + 1e-9 * values[:, 2]  # rounding noise around a constant
    values[4:, 3] = 0.5  # four rows differ
    values[100:, 4] = 0.5  # a tenth differs: a signal
    assert np.flatnonzero(constant_columns(values)).tolist() == [1]
    assert np.flatnonzero(near_constant_columns(values)).tolist() == [2, 3]


def test_constant_dimensions_are_named_with_the_filter():
    states, actions = record()
    states = [np.concatenate([s, np.full((len(s), 1), 3.0)], axis=1) for s in states]
    actions = [a * [1.0, 0.0] for a in actions]
    found = check_constant(sample(states, actions), NAMES)
    assert [(f.check, f.figures["kind"], f.figures["dims"]) for f in found] == [
        ("constant", "state", [4]),
        ("constant", "action", [1]),
    ]
    assert all(f.fix == "filters: {drop_constant_dims: true}" for f in found)


def test_share_at_the_bounds_is_exact():
    action = np.array([[-1.0, 0.3], [-1.0, 0.1], [0.2, 0.2], [1.0, 0.7]])
    assert bound_shares(action).tolist() == [[0.5, 0.25], [0.25, 0.25]]


def test_clipped_actions_are_saturated():
    states, actions = record()
    actions = [np.stack([np.clip(a[:, 0], -1, 1), a[:, 1]], axis=1) for a in actions]
    (found,) = check_saturated(sample(states, actions), NAMES)
    clipped = np.concatenate(actions)[:, 0]
    assert found.check == "saturated"
    assert found.figures["dims"] == [0]
    assert found.figures["rows"] == (np.abs(clipped) == 1).sum()
    assert found.figures["at_low"] == [pytest.approx((clipped == -1).mean())]
    assert "saturated_actions" in found.fix


def test_a_gripper_is_a_switch_and_not_saturated():
    states, actions = record()
    actions = [np.stack([np.sign(a[:, 0]), a[:, 1]], axis=1) for a in actions]
    (found,) = check_saturated(sample(states, actions), NAMES)
    assert (found.check, found.severity, found.figures["dims"]) == ("discrete", INFO, [0])
