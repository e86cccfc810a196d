from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import RescaleAction

from invdyn.envs.replay import SimulatorReplay
from invdyn.envs.task import OpenLoopSimulator, make_env, mujoco_env, read_state, round_inward, unclipped_range
from invdyn.errors import DataError
from tests.envs.tasks import PENDULUM, SHIFTED, roll, step_from

TASKS: list[tuple[str, dict[str, Any]]] = [
    (PENDULUM, {}),
    (SHIFTED, {}),
    ("InvertedPendulum-v5", {}),
    ("HalfCheetah-v5", {}),
    ("PhysicsShift-v0", {"task_id": "HalfCheetah-v5", "mass": 1.5, "action_offset": 0.3}),
    ("Pusher-v5", {}),
    ("InvertedPendulumTwoFactor-v5", {}),
    ("InvertedPendulumDeadZone-v5", {}),
]


@pytest.mark.parametrize(("env_id", "env_kwargs"), TASKS)
@pytest.mark.parametrize("fast", [True, False])
def test_replay_equals_step_bit_for_bit(
    env_id: str, env_kwargs: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, actions, _ = roll(env_id, env_kwargs, 60)
    actions = actions * 1.5  # some of them clipped by the simulator
    if not fast:
        monkeypatch.setattr(OpenLoopSimulator, "for_env", lambda env: None)
    replay = SimulatorReplay(env_id, env_kwargs)
    assert (replay._simulator is not None) == fast
    assert np.array_equal(replay(states, actions), step_from(make_env(env_id, env_kwargs), states, actions))


def test_replay_of_recorded_transitions() -> None:
    states, actions, next_states = roll(PENDULUM, {}, 200)
    assert np.array_equal(SimulatorReplay(PENDULUM)(states, actions), next_states)


def test_order_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    states, actions, _ = roll("HalfCheetah-v5", {}, 60)
    whole = SimulatorReplay("HalfCheetah-v5")(states, actions)
    monkeypatch.setattr("invdyn.envs.replay._BATCH_TICKS", 35)
    assert np.array_equal(SimulatorReplay("HalfCheetah-v5")(states[::-1], actions[::-1])[::-1], whole)


def test_run_equals_steps_with_the_warm_start() -> None:
    env = make_env("HalfCheetah-v5")
    simulator = OpenLoopSimulator.for_env(env)
    assert simulator is not None
    states, actions, next_states = roll("HalfCheetah-v5", {}, 60, episode_steps=60)
    env.reset(seed=0)
    assert np.array_equal(read_state(env), states[0])
    pieces = [simulator.run(piece) for piece in np.array_split(actions, 20)]
    assert np.array_equal(np.concatenate(pieces), next_states)


def test_restore_repeats_the_future() -> None:
    env = make_env("HalfCheetah-v5")
    simulator = OpenLoopSimulator.for_env(env)
    assert simulator is not None
    _, actions, _ = roll("HalfCheetah-v5", {}, 60)
    env.reset(seed=0)
    simulator.run(actions[:30])
    saved = simulator.save()
    first = simulator.run(actions[30:])
    simulator.restore(saved)
    assert np.array_equal(simulator.run(actions[30:]), first)


class _Kick(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Claims to add a constant, and does more."""

    action_offset = 0.0

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_offset = 0.0

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        mujoco_env(self).data.qvel[0] += 1e-9
        return result


@pytest.mark.parametrize("wrap", [_Kick, lambda env: RescaleAction(env, -1.0, 1.0)])
def test_tasks_that_do_more_than_simulate_are_noticed(wrap: Any) -> None:
    assert OpenLoopSimulator.for_env(wrap(make_env(PENDULUM))) is None


def test_no_rows() -> None:
    assert SimulatorReplay(PENDULUM)(np.empty((0, 4)), np.empty((0, 1))).shape == (0, 4)


@pytest.mark.parametrize(
    ("state", "action", "message"),
    [
        (np.zeros((2, 4)), np.zeros((2, 2)), r"action must have shape \(rows, 1\)"),
        (np.zeros((2, 4)), np.zeros((1, 1)), "as many rows, got 2 and 1"),
        (np.full((1, 4), np.inf), np.zeros((1, 1)), "state must be finite, row 0"),
    ],
)
def test_bad_rows(state: np.ndarray, action: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SimulatorReplay(PENDULUM)(state, action)


def test_unclipped_range_leaves_out_what_the_offset_clips() -> None:
    low, high = unclipped_range(make_env(SHIFTED))
    assert (low.tolist(), high.tolist()) == ([-3.0], [2.5])


def test_rounding_stays_inside() -> None:
    assert float(round_inward(np.array([0.4]), up=False)[0]) < 0.4 < float(np.float32(0.4))
    assert float(round_inward(np.array([-0.4]), up=True)[0]) > -0.4
    assert round_inward(np.array([0.5]), up=False)[0] == 0.5
