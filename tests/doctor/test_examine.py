"""The whole examination: clean recordings raise nothing, planted faults raise exactly their finding."""

from __future__ import annotations

import numpy as np
import pytest

from invdyn.doctor.examine import diagnose
from invdyn.doctor.findings import ERROR, INFO, WARNING, has_errors, summarize
from invdyn.errors import DataError
from invdyn.transitions.dataset_config import DatasetConfig
from tests.doctor.recordings import record, write_shards


def config(folder, **values):
    return DatasetConfig(name="masses", buffer_path=str(folder), **values)


def problems(diagnosis):
    return [(f.check, f.severity) for f in diagnosis.findings if f.severity != INFO]


def test_clean_recording(tmp_path):
    diagnosis = diagnose(config(write_shards(tmp_path, *record(60))))
    assert problems(diagnosis) == []
    assert not diagnosis.is_sample
    assert diagnosis.lag.steps == 0
    assert diagnosis.identifiability.configured < 1e-6
    assert summarize(diagnosis.findings) == "doctor: 0 errors, 0 warnings"


def test_clean_pendulum(repository):
    folder = repository / "data/sequence/pendulum_integrable"
    if not folder.is_dir():
        pytest.skip(f"no recording in {folder}: experiments/collect.py makes it")
    diagnosis = diagnose(DatasetConfig(name="pendulum_integrable", buffer_path=str(folder)), max_rows=30_000)
    assert problems(diagnosis) == []


def plant_nan(states, actions):
    states[4][7, 1] = np.nan


def plant_stale(states, actions):
    states[4][8] = states[4][7]


def plant_constant(states, actions):
    states[:] = [np.insert(state, 4, 1.0, axis=1) for state in states]


def plant_offset(states, actions):
    for state in states:
        state[:, 2] += 3e5


def plant_standstill(states, actions):
    states[:] = [np.full_like(state, 0.1) for state in states]


def plant_saturation(states, actions):
    for action in actions:
        np.clip(action, -1.0, 1.0, out=action)


def plant_leak(states, actions):
    states[:] = [np.insert(s, 4, np.append(a[:, 0], 0.0), axis=1) for s, a in zip(states, actions, strict=True)]


def plant_copies(states, actions):
    for i in range(30):
        states[30 + i][:], actions[30 + i][:] = states[i], actions[i]


def plant_boundary(states, actions):
    others, acted = record(1, 30, seed=5, spread=20.0)
    states[10][30:], actions[10][30:] = others[0], acted[0]


def plant_lag(states, actions):
    for action in actions:
        action[:-3] = action[3:].copy()  # row t holds the action of t + 3


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (plant_nan, {("finite", ERROR)}),
        (plant_stale, {("stale", WARNING)}),
        (plant_constant, {("constant", WARNING)}),
        (plant_offset, {("rounding", WARNING)}),
        (plant_standstill, {("constant", WARNING), ("stale", WARNING)}),
        (plant_saturation, {("saturated", WARNING)}),
        (plant_leak, {("leak_current", ERROR)}),
        (plant_copies, {("shared_rows", ERROR), ("duplicates", WARNING)}),
        (plant_boundary, {("jumps", ERROR)}),
        (plant_lag, {("lag", WARNING), ("identifiability", WARNING)}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_found_and_nothing_else(plant, expected, tmp_path):
    states, actions = record(60)
    plant(states, actions)
    diagnosis = diagnose(config(write_shards(tmp_path, states, actions)))
    found = set(problems(diagnosis))
    assert found == expected
    assert has_errors(diagnosis.findings) == any(severity == ERROR for _, severity in expected)
    if plant in (plant_nan, plant_stale, plant_boundary):
        (place,) = next(f for f in diagnosis.findings if (f.check, f.severity) in expected).places
        assert place.file == "shard-00000.hdf5"
        assert (place.episode, place.step) in {(4, 7), (10, 29)}


@pytest.mark.parametrize(
    ("plant", "filters"),
    [
        (plant_nan, {"episodes": {"exclude": ["shard-00000.hdf5:4"]}}),
        (plant_stale, {"drop_stale": True}),
        (plant_constant, {"drop_constant_dims": True}),
        (plant_saturation, {"saturated_actions": "drop"}),
        (plant_boundary, {"drop_jumps": 10.0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_filter_leaves_out_is_no_problem_any_more(plant, filters, tmp_path):
    states, actions = record(60)
    plant(states, actions)
    folder = write_shards(tmp_path, states, actions)
    assert problems(diagnose(config(folder)))
    diagnosis = diagnose(config(folder, filters=filters))
    assert problems(diagnosis) == []
    (name,) = filters
    told = [f.title for f in diagnosis.findings if f.title.endswith(f"; left out by filters: {name}")]
    assert len(told) == (plant is not plant_nan)
    assert diagnosis.total_episodes == 60 - (plant is plant_nan)


def test_a_filter_that_leaves_jumps_in_is_told(tmp_path):
    states, actions = record(60)
    plant_boundary(states, actions)
    folder = write_shards(tmp_path, states, actions)
    assert problems(diagnose(config(folder, filters={"drop_jumps": 1e4}))) == [("jumps", ERROR)]


def test_a_filter_of_episodes_that_are_not_there(tmp_path):
    folder = write_shards(tmp_path, *record(60))
    diagnosis = diagnose(config(folder, filters={"episodes": {"include": ["nothing:0"]}}))
    assert ("extraction", ERROR) in problems(diagnosis)


def test_a_large_recording_is_sampled_and_says_so(tmp_path):
    diagnosis = diagnose(config(write_shards(tmp_path, *record(60))), max_rows=1000)
    assert diagnosis.is_sample
    assert diagnosis.num_states <= 1000 + 61
    assert "a sample of 3,660 states in 60 episodes" in diagnosis.scope
    assert problems(diagnosis) == []


def test_nothing_finite_still_gives_a_diagnosis(tmp_path):
    states, actions = record(12)
    diagnosis = diagnose(config(write_shards(tmp_path, [s * np.nan for s in states], actions)))
    assert problems(diagnosis) == [("finite", ERROR)]
    assert diagnosis.lag is None


@pytest.mark.parametrize(("constant", "noise"), [("state", 0.0), ("action", 0.0), ("action", 3e-8)])
def test_nothing_to_fit_still_gives_a_diagnosis(constant, noise, tmp_path):
    states, actions = record(12)
    for values in states if constant == "state" else actions:
        values[:] = 1.0 + noise * np.random.default_rng(0).normal(size=values.shape)
    diagnosis = diagnose(config(write_shards(tmp_path, states, actions)))
    assert {"constant", "near_constant"} & {check for check, _ in problems(diagnosis)}
    assert diagnosis.lag is None
    assert diagnosis.identifiability is None


def test_a_config_that_extraction_refuses(tmp_path):
    diagnosis = diagnose(config(write_shards(tmp_path, *record(12, 20)), gap=30))
    assert ("extraction", ERROR) in problems(diagnosis)
    diagnosis = diagnose(config(write_shards(tmp_path, *record(12, 20)), gap=8))
    assert ("dropped", WARNING) in problems(diagnosis)


@pytest.mark.parametrize("values", [{"history": 2}, {"horizon": 3, "gap": 3}, {"gap": 12, "history": 5}])
def test_every_window_is_examined(values, tmp_path):
    diagnosis = diagnose(config(write_shards(tmp_path, *record(60)), **values))
    window = diagnosis.identifiability.window
    assert (window.gap, window.history) in diagnosis.identifiability.grid
    assert len(diagnosis.identifiability.linear) == 2


def test_one_dimension_and_short_episodes(tmp_path):
    states, actions = record(80, 3)
    folder = write_shards(tmp_path, [s[:, :1] for s in states], [a[:, :1] for a in actions])
    assert diagnose(config(folder)).num_episodes == 80


def test_dimensions_are_named_by_their_keys(tmp_path):
    states, actions = record(60)
    for state in states:
        state[:, 1] = 0.0
    folder = write_shards(tmp_path, states, actions)
    shape_meta = {"obs": {"state": {"shape": [4]}}}
    diagnosis = diagnose(config(folder, shape_meta=shape_meta))
    constant = next(f for f in diagnosis.findings if f.check == "constant")
    assert "state 1" in constant.evidence


def test_a_missing_recording(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        diagnose(config(tmp_path / "nowhere"))
