from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from invdyn.envs import rollout
from invdyn.envs.collect_config import CollectConfig
from invdyn.envs.replay import SimulatorReplay
from invdyn.envs.rollout import EpisodeRecorder, collect_shard, dimension_bounds
from invdyn.envs.task import OpenLoopSimulator
from invdyn.errors import ConfigError
from tests.envs.tasks import PENDULUM, SHIFTED

LIMITS = {0: 0.95, 1: 1.2}


def config_of(**values: Any) -> CollectConfig:
    defaults = {"env_id": PENDULUM, "num_episodes": 12, "episodes_per_shard": 5, "state_limits": LIMITS}
    return CollectConfig.model_validate({**defaults, **values})


def episodes_of(config: CollectConfig) -> list[rollout.Episode]:
    recorder = EpisodeRecorder(config)
    return [recorder.record(number) for number in range(config.num_episodes)]


def test_every_recorded_step_is_a_step_of_the_simulator() -> None:
    config = config_of(env_id=SHIFTED, physics={"mass": 1.2})
    replay = SimulatorReplay(*config.task)
    for episode in episodes_of(config):
        assert episode.state.dtype == np.float64
        assert episode.action.dtype == np.float32
        assert len(episode.state) == len(episode.action) + 1 >= 2
        assert np.array_equal(replay(episode.state[:-1], episode.action), episode.state[1:])


def test_episodes_end_before_the_limits() -> None:
    limited, free = (episodes_of(config_of(state_limits=limits)) for limits in (LIMITS, None))
    for inside, whole in zip(limited, free, strict=True):
        size = len(inside.state)
        assert (np.abs(inside.state[:, :2]) < [0.95, 1.2]).all()
        assert np.array_equal(inside.state, whole.state[:size])
        assert size == len(whole.state) or not (np.abs(whole.state[size, :2]) < [0.95, 1.2]).all()
    assert min(len(episode.action) for episode in free) == 200


def test_limits_can_be_ranges_of_any_dimension() -> None:
    for episode in episodes_of(config_of(state_limits=[[-0.5, 0.1], None, None, 2.0])):
        assert episode.state[:, 0].max() < 0.1
        assert np.abs(episode.state[:, 3]).max() < 2.0


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"policy": {"name": "ornstein_uhlenbeck"}, "state_limits": None},
        {"physics": {"gear": 1e9}, "state_limits": None},  # explodes within a few steps: MuJoCo resets itself
        {"env_id": "HalfCheetah-v5", "end_at_termination": False, "state_limits": {1: 0.5}, "max_episode_steps": 60},
        {"env_id": "InvertedPendulumAntagonist-v5"},
    ],
    ids=["limits", "free", "diverging", "contacts", "actuation"],
)
def test_running_ahead_in_c_equals_stepping(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(num_episodes=6, **values)
    assert EpisodeRecorder(config)._simulator is not None
    fast = episodes_of(config)
    monkeypatch.setattr(OpenLoopSimulator, "for_env", lambda env: None)
    slow = episodes_of(config)
    for one, other in zip(fast, slow, strict=True):
        assert one.state.tobytes() == other.state.tobytes()
        assert one.action.tobytes() == other.action.tobytes()
        assert one.num_attempts == other.num_attempts


def test_a_diverging_episode_ends_before_the_simulator_resets_itself() -> None:
    for episode in episodes_of(config_of(physics={"gear": 1e9}, state_limits=None)):
        assert 1 <= len(episode.action) < 200
        velocity = (episode.state[1:, :2] - episode.state[:-1, :2]) / 0.02
        np.testing.assert_allclose(velocity, episode.state[1:, 2:], rtol=1e-6, atol=1e-3 * np.abs(velocity).max())


@pytest.mark.parametrize("end", [True, False])
def test_termination_ends_an_episode_after_its_last_step(end: bool) -> None:
    config = config_of(env_id="InvertedPendulum-v5", end_at_termination=end, state_limits=None, max_episode_steps=80)
    episodes = episodes_of(config)
    beyond = [np.flatnonzero(np.abs(episode.state[:, 1]) > 0.2) for episode in episodes]
    if end:
        assert all(list(found) in ([], [len(e.state) - 1]) for found, e in zip(beyond, episodes, strict=True))
        assert any(len(found) for found in beyond)
    else:
        assert all(len(episode.action) == 80 for episode in episodes)


def test_episodes_do_not_depend_on_the_others() -> None:
    config = config_of()
    whole = episodes_of(config)
    alone = EpisodeRecorder(config).record(7)
    assert np.array_equal(alone.state, whole[7].state)
    assert len({episode.state.tobytes() for episode in whole}) == len(whole)


def test_seed_changes_the_episodes() -> None:
    assert not np.array_equal(episodes_of(config_of())[0].state, episodes_of(config_of(seed=1))[0].state)


def test_a_longer_recording_begins_with_the_shorter() -> None:
    short, long = episodes_of(config_of(num_episodes=3)), episodes_of(config_of(num_episodes=6))
    assert all(np.array_equal(one.state, other.state) for one, other in zip(short, long, strict=False))


def test_resets() -> None:
    own = np.array([episode.state[0] for episode in episodes_of(config_of())])
    assert np.abs(own).max() <= 0.01
    noisy = np.array([episode.state[0] for episode in episodes_of(config_of(reset={"noise_scale": 0.3}))])
    assert 0.1 < np.abs(noisy).max() <= 0.3
    ranged = config_of(reset={"state_range": {0: [0.2, 0.4], 3: 1.0}})
    starts = np.array([episode.state[0] for episode in episodes_of(ranged)])
    assert ((starts[:, 0] >= 0.2) & (starts[:, 0] <= 0.4)).all()
    assert 0.3 < np.abs(starts[:, 3]).max() <= 1.0
    assert np.abs(starts[:, 1:3]).max() <= 0.01


def test_starts_outside_the_limits_are_drawn_again() -> None:
    episodes = episodes_of(config_of(reset={"state_range": {0: 1.9}}))
    assert max(episode.num_attempts for episode in episodes) > 1
    assert all(np.abs(episode.state[:, 0]).max() < 0.95 for episode in episodes)


def test_no_room_inside_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "MAX_ATTEMPTS", 5)
    with pytest.raises(
        ConfigError, match="state_limits must leave room for one step; episode 0 had none from 5 starts"
    ):
        EpisodeRecorder(config_of(state_limits={3: 1e-6})).record(0)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({4: 1.0}, "state_limits must name dimensions from 0 to 3, got 4"),
        ((1.0, None), "state_limits must list 4 ranges, .* got 2"),
        ({1: (2.0, 1.0)}, r"state_limits.1 must be \[low, high\] with low < high, got \[2.0, 1.0\]"),
    ],
)
def test_bad_limits(ranges: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dimension_bounds("state_limits", ranges, 4)


@pytest.mark.parametrize("policy", [{}, {"low": -1.0, "high": 1.0}])
def test_an_offset_that_lets_every_action_be_clipped(policy: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"action_offset must leave .* between \[-3.0\] and \[-4.0\]"):
        EpisodeRecorder(config_of(env_kwargs={"action_offset": 7.0}, policy={"name": "uniform", **policy}))


def test_shard_holds_its_episodes(tmp_path: Path) -> None:
    config = config_of(env_id=SHIFTED, env_kwargs={"action_offset": 0.25}, physics={"mass": 1.5}, seed=3)
    episodes = episodes_of(config)[10:]
    steps: list[int] = []
    record = collect_shard(config, tmp_path, 2, steps.append)
    assert record.path == str(tmp_path / "shard-00002.hdf5")
    assert (record.num_episodes, record.num_steps) == (2, sum(steps))
    with h5py.File(record.path) as file:
        assert np.array_equal(file["data/state"], np.concatenate([episode.state for episode in episodes]))
        assert np.array_equal(file["data/action"], np.concatenate([episode.action for episode in episodes]))
        assert file["data/state"].dtype == np.float64
        assert file["data/action"].dtype == np.float32
        assert file["meta/episode_ends"][:].tolist() == np.cumsum(steps).tolist()
        assert file["meta/state_ends"][:].tolist() == (np.cumsum(steps) + np.array([1, 2])).tolist()
        assert file["meta/state_ends"].dtype == file["meta/episode_ends"].dtype == np.int64
        attributes = dict(file.attrs)
    assert (attributes["format"], attributes["version"], attributes["seed"]) == ("invdyn-sequences", 1, 3)
    assert attributes["dt_s"] == 0.02
    assert attributes["env_id"] == "PhysicsShift-v0"


def test_attributes_of_a_shard_remake_its_task(tmp_path: Path) -> None:
    import json

    config = config_of(env_kwargs={"action_offset": 0.25}, physics={"damping": 2.0, "action_offset": [0.5]})
    record = collect_shard(config, tmp_path, 0)
    with h5py.File(record.path) as file:
        replay = SimulatorReplay(file.attrs["env_id"], json.loads(file.attrs["env_kwargs"]))
        size = file["meta/episode_ends"][0]
        states, actions = file["data/state"][: size + 1], file["data/action"][:size]
    assert np.array_equal(replay(states[:-1], actions), states[1:])


def test_states_on_joint_limits_are_counted(tmp_path: Path) -> None:
    free = collect_shard(config_of(state_limits=None), tmp_path, 0)
    assert free.num_limit_states > 0
    assert collect_shard(config_of(), tmp_path, 1).num_limit_states == 0
