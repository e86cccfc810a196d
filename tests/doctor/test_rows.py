from __future__ import annotations

import numpy as np
import pytest

from invdyn.doctor.filtered import mark_filtered
from invdyn.doctor.findings import ERROR, INFO, MAX_PLACES, WARNING
from invdyn.doctor.rows import (
    check_duplicates,
    check_jumps,
    check_stale,
    hash_rows,
    measure_motion,
    neighbour_steps,
    repeated,
)
from invdyn.transitions.filters import FiltersConfig
from tests.doctor.recordings import NAMES, record, sample

FIXED_SIZE = 60


def where(finding):
    return [(place.episode, place.step) for place in finding.places]


def jump_findings(recording):
    return check_jumps(recording, measure_motion(recording), NAMES)


def test_clean_recording_has_no_finding():
    clean = sample(*record(), [0] * 30 + [1] * 5 + [2] * 5)
    assert check_stale(clean) == []
    assert check_duplicates(clean) == []
    assert jump_findings(clean) == []


def test_stale_steps_are_found_exactly():
    states, actions = record()
    for episode, step in ((2, 0), (2, 59), (17, 30)):
        states[episode][step + 1] = states[episode][step]
    (found,) = check_stale(sample(states, actions))
    assert found.severity == WARNING
    assert where(found) == [(2, 0), (2, 59), (17, 30)]
    assert found.figures["inside"] == 3
    assert found.figures["at_ends"] == 0
    assert found.fix == "filters: {drop_stale: true}"


def test_an_end_without_a_reset_is_found_across_the_cut():
    # One recording cut in three at steps 20 and 40, where the state after the mark is the old one.
    states, actions = record(1)
    pieces = [states[0][:21], states[0][20:41], states[0][40:]]
    (found,) = check_stale(sample(pieces, np.split(actions[0], [20, 40])))
    assert (found.figures["inside"], found.figures["at_ends"]) == (0, 2)
    assert where(found) == [(0, 20), (1, 20)]


def test_one_dimension_at_rest_is_not_stale():
    states, actions = record()
    states[2][:, 1] = 3.0
    assert check_stale(sample(states, actions)) == []


def test_almost_equal_states_are_not_stale():
    states, actions = record()
    states[2][5] = states[2][4] + 1e-12
    assert check_stale(sample(states, actions)) == []


def test_hashes_tell_rows_apart_and_equal_rows_are_equal():
    values = np.random.default_rng(0).normal(size=(20_000, 3))
    assert len(np.unique(hash_rows(values))) == 20_000
    assert len(np.unique(hash_rows(values[:, ::-1]))) == 20_000
    assert (hash_rows(values) != hash_rows(values[:, ::-1])).all()
    assert hash_rows(np.array([[0.0, 1.0]])) == hash_rows(np.array([[-0.0, 1.0]]))
    assert repeated(hash_rows(values[[0, 1, 0]])).tolist() == [False, False, True]


def test_duplicates_within_train():
    states, actions = record()
    states[7], actions[7] = states[3].copy(), actions[3].copy()
    (found,) = check_duplicates(sample(states, actions))
    assert (found.check, found.severity) == ("duplicates", WARNING)
    assert where(found) == [(7, step) for step in range(60)]
    assert found.figures["episodes"] == 1


def test_validation_rows_that_are_in_train():
    split = [0] * 30 + [1] * 10
    states, actions = record()
    states[35], actions[35] = states[3].copy(), actions[3].copy()
    (found,) = check_duplicates(sample(states, actions, split))
    assert (found.check, found.severity) == ("shared_rows", ERROR)  # 60 of 600 rows
    assert where(found) == [(35, step) for step in range(60)]
    states[36][10:13], actions[36][10:12] = states[4][20:23], actions[4][20:22]
    states[35], actions[35] = record(seed=9)[0][0], record(seed=9)[1][0]
    (found,) = check_duplicates(sample(states, actions, split))
    assert (found.severity, where(found), found.figures["episodes"]) == (WARNING, [(36, 10), (36, 11)], 0)


def test_few_repeats_are_only_a_note():
    states, actions = record()
    states[36][10:13], actions[36][10:12] = states[4][20:23], actions[4][20:22]
    (found,) = check_duplicates(sample(states, actions))
    assert (found.severity, found.figures["rows"]) == (INFO, 2)


def test_same_states_with_another_action_are_no_duplicates():
    states, actions = record()
    states[7] = states[3].copy()
    assert check_duplicates(sample(states, actions)) == []


def merged(states, actions):
    """All episodes as one, the boundaries unmarked: a state after the last one would be the next reset."""
    return [np.concatenate([s[:-1] for s in states])], [np.concatenate(actions)]


def jumps_of(recording):
    (found,) = [finding for finding in jump_findings(recording) if finding.check == "jumps"]
    return found


def test_unmarked_boundaries_are_found_and_nothing_else():
    states, actions = record()
    found = jumps_of(sample(*merged(states, actions)))
    assert found.severity == ERROR
    boundaries = [FIXED_SIZE * i - 1 for i in range(1, 40)]
    steps = [step for _, step in where(found)]
    assert set(steps) <= set(boundaries)
    assert len(steps) >= 0.8 * len(boundaries)  # a reset may land near where the episode ended
    assert "drop_jumps" in found.fix


def test_ends_marked_one_row_late():
    states, actions = record()
    late = [np.concatenate([states[i], states[i + 1][:1]]) for i in range(39)]
    acted = [np.concatenate([actions[i], actions[i][-1:]]) for i in range(39)]
    found = jumps_of(sample(late, acted))
    assert found.figures["at_episode_end"] == found.figures["steps"] >= 30
    assert "marked too late" in found.evidence


def test_drop_jumps_separates_jumps_from_steps():
    states, actions = record()
    found = jumps_of(sample(*merged(states, actions)))
    multiple = float(found.fix.split("drop_jumps: ")[1].split("}")[0])
    if min(found.figures["multiples"]) > found.figures["largest_other"]:
        assert found.figures["largest_other"] < multiple < min(found.figures["multiples"])
    else:
        assert multiple == pytest.approx(min(found.figures["multiples"]), rel=0.05)


def test_a_filter_that_leaves_the_smallest_of_many_jumps_in_is_told():
    large, small = record(1050, 20, spread=20.0), record(100, 20, seed=1, spread=3.0)
    found = jumps_of(sample(*merged(large[0] + small[0], large[1] + small[1])))
    smallest, listed = found.figures["smallest_multiple"], min(found.figures["multiples"])
    assert found.figures["steps"] > len(found.figures["multiples"]) == MAX_PLACES
    for multiple, severity in (((smallest + listed) / 2, ERROR), (0.99 * smallest, INFO)):
        (told,) = mark_filtered([found], FiltersConfig(drop_jumps=multiple))
        assert told.severity == severity


def test_beside_a_boundary_a_spike_stays_a_spike():
    states, actions = record()
    states[11][30:, 1] += 9.0
    others, acted = record(1, 30, seed=5, spread=20.0)
    states[20][30:], actions[20][30:] = others[0], acted[0]
    found = {f.check: where(f) for f in jump_findings(sample(states, actions))}
    assert found == {"jumps": [(20, 29)], "spikes": [(11, 29)]}


def test_neighbours_are_of_the_same_episode():
    moved = np.array([[1.0], [2.0], [9.0], [3.0], [1.0]])
    around = neighbour_steps(moved, np.array([0, 0, 1, 1, 1]))
    assert around[:, 0].tolist() == [2.0, 1.0, 3.0, 9.0, 9.0]


def test_an_impact_is_no_boundary():
    states, actions = record()
    states[11][30:, 2:] += 9.0  # both velocities jump, the positions only start to
    states[11][30:, :2] += 0.9 * np.arange(31)[:, None]
    assert [f.check for f in jump_findings(sample(states, actions))] == ["spikes"]


def test_a_fast_stretch_is_no_jump():
    states, actions = record()
    moving = [s.copy() for s in states]
    moving[4][20:40] += 5.0 * np.arange(20)[:, None]  # fast, but for many steps
    moving[4][40:] += 5.0 * 19
    assert [f for f in jump_findings(sample(moving, actions)) if f.check == "jumps"] == []


def test_an_angle_that_wraps():
    angle = [np.cumsum(np.full(61, 0.3)) + i for i in range(40)]
    states, actions = record()
    wrapped = [
        np.concatenate([s, ((a + np.pi) % (2 * np.pi) - np.pi)[:, None]], 1) for s, a in zip(states, angle, strict=True)
    ]
    (found,) = jump_findings(sample(wrapped, actions))
    assert (found.check, found.figures["dims"]) == ("angle_wraps", [4])
    expected = [(i, t) for i, s in enumerate(wrapped) for t in np.flatnonzero(np.diff(s[:, 4]) < 0)]
    assert where(found) == expected


def test_beside_an_angle_that_wraps_nothing_looks_like_a_reset():
    """Half of the dimensions wrap; where the other one kicks in too, most of them jump at once."""
    generator = np.random.default_rng(0)
    states, actions = [], []
    for _ in range(40):
        velocity = np.cumsum(0.3 * generator.normal(size=201))
        angle = np.cumsum(0.05 * velocity) + generator.uniform(0, 6)
        states.append(np.stack([(angle + np.pi) % (2 * np.pi) - np.pi, velocity], 1))
        actions.append(np.diff(velocity)[:, None])
    assert [f.check for f in jump_findings(sample(states, actions))] == ["angle_wraps"]
    for i in range(0, 40, 2):
        states[i] = np.concatenate([states[i][:101], states[i + 1][101:] + np.array([0.0, 8.0])])
    found = {f.check: where(f) for f in jump_findings(sample(states, actions))}
    assert {(i, 100) for i in range(0, 40, 2)} >= set(found["jumps"])
    assert len(found["jumps"]) >= 10


def test_a_velocity_that_an_impact_changes_by_as_much_is_no_angle():
    states, actions = record()
    for state in states:
        state[30:45, 2] += 2 * np.pi
    assert {f.check for f in jump_findings(sample(states, actions))} == {"spikes"}


def test_an_impact_that_nudges_a_position_at_rest_is_no_boundary():
    states, actions = record()
    states[11][30:, 2:] += 9.0
    states[11][20:30, 0] = states[11][20, 0]
    states[11][30:40, 0] = states[11][20, 0] + 1e-3
    assert [f.check for f in jump_findings(sample(states, actions))] == ["spikes"]


def test_a_sensor_spike_in_one_dimension():
    states, actions = record()
    states[11][30:, 1] += 9.0
    (found,) = jump_findings(sample(states, actions))
    assert (found.check, where(found), found.figures["dims"]) == ("spikes", [(11, 29)], [1])
