"""The linear inverse by moments, against plain least squares; the lag and the window that a recording is made with."""

from __future__ import annotations

import numpy as np
import pytest

from invdyn.doctor import dynamics
from invdyn.doctor.dynamics import fit_folds, fold_of, make_rows, unexplained
from invdyn.doctor.identifiability import check_identifiability, measure_identifiability, rows_around
from invdyn.doctor.lag import check_lag, measure_lag
from invdyn.doctor.neighbours import nearest, unexplained_by_neighbours
from invdyn.statistics import transition_features
from invdyn.transitions.windows import Window, make_transitions
from tests.doctor.recordings import NAMES, record, sample


def noisy(noise=0.3, **options):
    states, actions = record(**options)
    generator = np.random.default_rng(1)
    return states, [a + noise * generator.normal(size=a.shape) for a in actions]


@pytest.mark.parametrize("window", [Window(1, 1, 0), Window(3, 1, 2), Window(2, 2, 1), Window(1, 1, 3)])
def test_unexplained_is_that_of_least_squares_on_the_same_rows(window, monkeypatch):
    monkeypatch.setattr(dynamics, "RIDGES", dynamics.RIDGES[:1])
    states, actions = noisy()
    blurred = [s + 0.05 * np.random.default_rng(i).normal(size=s.shape) for i, s in enumerate(states)]
    found = sample(blurred, actions)  # no two features are collinear
    rows = make_rows(found, {-window.history, window.gap, *range(-window.history, window.gap)}, window.horizon)
    shares = unexplained(rows, fit_folds(rows, rows.window_blocks(window)))

    limit = np.full(40, 10**6)
    made = make_transitions(found, window, found.num_states, found.num_actions, limit, 0)
    features = transition_features(made.state.astype(np.float64), made.next_state.astype(np.float64))
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    target = made.action.reshape(len(made), -1).astype(np.float64)
    fold, count = fold_of(made.episode)
    error = np.zeros(target.shape[1])
    for index in range(count):
        solution = np.linalg.lstsq(design[fold != index], target[fold != index], rcond=None)[0]
        error += ((target[fold == index] - design[fold == index] @ solution) ** 2).sum(axis=0)
    assert shares == pytest.approx(error / len(made) / target.var(axis=0), rel=1e-4)


def test_shifts_are_those_of_a_recording_moved_by_hand():
    states, actions = noisy()
    found = sample(states, actions)
    rows = make_rows(found, range(-3, 10), 1)
    for shift in (-2, 0, 4):
        # Row t of the moved recording holds the step t + shift and the action t, for the same t as above.
        moved = sample([s[3 + shift : 53 + shift] for s in states], [a[3:52] for a in actions])
        other = make_rows(moved, range(2), 1)
        assert len(other.values) == len(rows.values)
        expected = unexplained(other, fit_folds(other, other.window_blocks(Window())))
        assert unexplained(rows, fit_folds(rows, rows.shift_blocks(shift))) == pytest.approx(expected, rel=1e-6)


def test_a_linear_system_leaves_nothing():
    rows = rows_around(sample(*record()), Window())
    shares = unexplained(rows, fit_folds(rows, rows.window_blocks(Window())))
    assert (shares < 1e-9).all()


def test_noise_in_the_action_is_what_is_left():
    states, actions = record(200)
    noise = np.random.default_rng(1)
    spoilt = [a + noise.normal(size=a.shape) * [0.5, 0.0] for a in actions]
    rows = rows_around(sample(states, spoilt), Window())
    found = measure_identifiability(rows, Window(), 2)
    variance = np.concatenate(spoilt)[:, 0].var()
    assert found.linear[0] == pytest.approx(0.25 / variance, rel=0.05)
    assert found.neighbours[0] == pytest.approx(0.25 * (1 + 1 / 5) / variance, rel=0.15)  # the mean of 5 noisy ones
    assert max(found.linear[1], found.neighbours[1]) < 1e-9


def test_neighbours_find_what_a_line_cannot():
    generator = np.random.default_rng(0)
    states = [generator.uniform(-1, 1, size=(101, 1)) for _ in range(40)]
    actions = [(s[:-1] * np.diff(s, axis=0)) for s in states]  # even in sign: no line tells it
    rows = make_rows(sample(states, actions), {1}, 1)
    blocks = rows.window_blocks(Window())
    folds = fit_folds(rows, blocks)
    assert unexplained(rows, folds)[0] > 0.5
    assert unexplained_by_neighbours(rows, blocks, folds)[0] < 0.02


def test_nearest_rows_against_brute_force():
    generator = np.random.default_rng(0)
    query, reference = generator.normal(size=(20, 3)), generator.normal(size=(300, 3))
    found = nearest(query, reference, 4)
    exact = np.linalg.norm(query[:, None] - reference, axis=2).argsort(axis=1)[:, :4]
    assert (np.sort(found, axis=1) == np.sort(exact, axis=1)).all()


def test_many_rows_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(dynamics, "MAX_VALUES", 10_000)
    rows = make_rows(sample(*record()), range(-3, 10), 1)
    assert rows.values.size <= 10_000
    assert np.bincount(rows.fold, minlength=rows.num_folds).min() > 0


def test_pieces_of_one_episode_share_a_fold():
    whole = sample(*record(10, 40))
    rows = make_rows(whole.cut_at(np.arange(20, 400, 40)), {1}, 1)
    assert rows.fold.tolist() == np.repeat(np.arange(10) % 5, 39).tolist()


def test_folds_share_no_episode():
    episode = np.repeat(np.arange(7), 11)
    fold, count = fold_of(episode)
    assert count == 5
    assert all(len(set(fold[episode == e].tolist())) == 1 for e in range(7))
    fold, count = fold_of(np.zeros(50, int))
    assert (count, (np.diff(fold) >= 0).all()) == (5, True)


@pytest.mark.parametrize("horizon", [1, 2, 4])
@pytest.mark.parametrize("delay", [0, 1, 2, 4, 7])
def test_a_planted_delay_is_the_lag(delay, horizon):
    found = sample(*noisy(0.05, delay=delay))
    rows = rows_around(found, Window(1, horizon))
    lag = measure_lag(rows, 2)
    assert lag.steps == delay
    assert lag.best.tolist() == [delay, delay]
    advised = measure_identifiability(rows_around(found, Window()), Window(), 2).advised[0]
    findings = check_lag(lag, Window(), NAMES, advised)
    if delay == 0:
        assert findings == []
    else:
        (finding,) = findings
        assert finding.title == f"action lag +{delay}: the action in row t explains the step t+{delay} best"
        assert finding.fix.startswith(f"gap: {delay + 1},")


@pytest.mark.parametrize(
    ("gap", "advised", "fix"), [(2, 4, "gap: 4,"), (4, 4, "gap: 5,"), (2, 6, "gap: 6,"), (5, 5, "")]
)
def test_the_configured_gap_is_not_advised(gap, advised, fix):
    lag = measure_lag(rows_around(sample(*noisy(0.05, delay=4)), Window()), 2)
    (finding,) = check_lag(lag, Window(gap), NAMES, advised)
    assert finding.fix.startswith(fix)
    assert bool(finding.fix) == bool(fix)


def test_actions_recorded_a_row_late_have_a_negative_lag():
    states, actions = noisy(0.05)
    late = [np.concatenate([a[:1], a[:1], a[:-2]]) for a in actions]  # row t holds the action of t - 2
    found = sample(states, late)
    lag = measure_lag(rows_around(found, Window()), 2)
    assert lag.steps == -2
    (finding,) = check_lag(lag, Window(), NAMES)
    assert finding.fix.startswith("history: 2")
    (finding,) = check_lag(lag, Window(1, 1, 2), NAMES)
    assert finding.fix == ""


def test_a_position_command_reached_four_frames_later():
    generator = np.random.default_rng(0)
    path = np.cumsum(np.cumsum(generator.normal(size=(30, 90, 6)), axis=1), axis=1)
    states = [p[:81] + 0.01 * generator.normal(size=(81, 6)) for p in path]
    actions = [p[4:84] for p in path]
    lag = measure_lag(rows_around(sample(states, actions), Window()), 6)
    assert lag.steps in (3, 4)  # s_{t+4} ends one step and starts the next


def test_a_lag_beyond_the_shifts_is_said_to_be():
    lag = measure_lag(rows_around(sample(*noisy(0.05, delay=9)), Window()), 2)
    assert lag.at_edge.all() or lag.steps == 0


def test_history_is_advised_where_velocity_is_missing():
    states, actions = record(100)
    positions = [s[:, :2] for s in states]  # x'' needs three positions
    rows = rows_around(sample(positions, actions), Window())
    found = measure_identifiability(rows, Window(), 2)
    assert found.grid[1, 0] > 0.1
    assert found.grid[1, 1] < 1e-6
    assert found.advised == (1, 1)
    (finding,) = check_identifiability(found, NAMES)
    assert finding.fix == "gap: 1, history: 1"


def test_short_episodes_are_measured_as_far_as_they_reach():
    rows = rows_around(sample(*record(300, 4)), Window())
    assert rows is not None
    assert max(rows.offsets) < 5
    assert measure_lag(rows, 2).steps == 0


def test_too_few_rows_are_said_to_be():
    rows = rows_around(sample(*record(3, 15)), Window())
    (finding,) = check_identifiability(measure_identifiability(rows, Window(), 2), NAMES)
    assert finding.severity == "info"
    assert "too few rows" in finding.title
    assert rows_around(sample(*record(2, 2)), Window()) is None
