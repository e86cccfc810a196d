from __future__ import annotations

from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from invdyn.envs.inverse import PhysicalInverse
from invdyn.envs.task import make_env, mujoco_env
from invdyn.errors import ConfigError, DataError
from tests.envs.tasks import PENDULUM, SHIFTED, pendulum_xml, random_actions, random_pendulum_states, roll, step_from

CHEETAH_SHIFT: dict[str, Any] = {
    "task_id": "HalfCheetah-v5",
    "task_kwargs": {"frame_skip": 1},
    "mass": 1.3,
    "gear": 0.7,
    "friction": 0.5,
    "damping": 2.0,
    "armature": 3.0,
    "action_offset": -0.1,
}


def relative_error(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    return np.abs(found - true).max(axis=1) / np.abs(true).max(axis=1)


@pytest.mark.parametrize(
    ("env_id", "env_kwargs"),
    [
        (PENDULUM, {}),
        (SHIFTED, {}),
        (SHIFTED, {"action_offset": -1.5}),
        ("PhysicsShift-v0", {"task_id": PENDULUM, "mass": 2.0, "gear": 0.5, "damping": 3.0, "action_offset": 0.25}),
    ],
)
def test_inverse_is_exact_inside_the_limits(env_id: str, env_kwargs: dict[str, Any]) -> None:
    env = make_env(env_id, env_kwargs)
    states = random_pendulum_states(1000)
    actions = random_actions(env, 1000)
    solution = PhysicalInverse(env_id, env_kwargs).solve(states, step_from(env, states, actions))
    assert solution.action.dtype == np.float64
    # Rounding of the velocities is absolute, so actions near zero are compared with the smallest fair one.
    size = np.maximum(np.abs(actions), 1e-3)
    assert (np.abs(solution.action - actions) / size).max() <= 1e-9
    assert not solution.constrained.any()
    assert solution.residual.max() < 1e-9


def test_inverse_from_single_precision_states() -> None:
    env = make_env(PENDULUM)
    states = random_pendulum_states(1000).astype(np.float32)
    actions = random_actions(env, 1000)
    next_states = step_from(env, states.astype(np.float64), actions).astype(np.float32)
    error = PhysicalInverse(PENDULUM)(states, next_states) - actions
    assert 0 < np.sqrt((error**2).mean()) < 1e-5


@pytest.mark.parametrize(
    ("env_id", "env_kwargs"), [("HalfCheetah-v5", {"frame_skip": 1}), ("PhysicsShift-v0", CHEETAH_SHIFT)]
)
def test_inverse_through_contacts(env_id: str, env_kwargs: dict[str, Any]) -> None:
    states, actions, next_states = roll(env_id, env_kwargs, 300)
    solution = PhysicalInverse(env_id, env_kwargs).solve(states, next_states)
    error = relative_error(solution.action, actions)
    assert 0 < solution.constrained.sum() < len(states)
    assert error[~solution.constrained].max() <= 1e-9
    assert error[solution.constrained].max() <= 1e-6


@pytest.mark.parametrize("integrator", ["implicit", "implicitfast"])
def test_implicit_integrators_are_inverted(integrator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = getattr(mujoco.mjtIntegrator, f"mjINT_{integrator.upper()}")

    def make(env_id: str, env_kwargs: Any = None) -> Any:
        env = make_env(env_id, env_kwargs)
        mujoco_env(env).model.opt.integrator = value
        return env

    monkeypatch.setattr("invdyn.envs.inverse.make_env", make)
    env = make(PENDULUM)
    states = random_pendulum_states(50)
    actions = random_actions(env, 50)
    found = PhysicalInverse(PENDULUM)(states, step_from(env, states, actions))
    np.testing.assert_allclose(found, actions, rtol=1e-9, atol=1e-11)


def test_position_servos_are_inverted(tmp_path: Path) -> None:
    servo = '<position ctrllimited="true" ctrlrange="-3 3" kp="40" kv="2" gear="2" joint="slider" name="slide"/>'
    motor = '<motor ctrllimited="true" ctrlrange="-3 3" gear="100" joint="slider" name="slide"/>'
    kwargs = {"xml_file": pendulum_xml(tmp_path, motor, servo), "action_offset": 0.3}
    env = make_env(PENDULUM, kwargs)
    states = random_pendulum_states(50)
    actions = random_actions(env, 50)
    found = PhysicalInverse(PENDULUM, kwargs)(states, step_from(env, states, actions))
    np.testing.assert_allclose(found, actions, rtol=1e-9, atol=1e-10)


def test_narrow_control_ranges_are_inverted(tmp_path: Path) -> None:
    kwargs = {"xml_file": pendulum_xml(tmp_path, 'ctrlrange="-3 3" gear', 'ctrlrange="-0.4 0.4" gear')}
    env = make_env(PENDULUM, kwargs)
    states = random_pendulum_states(50)
    actions = random_actions(env, 50)
    assert np.abs(actions).max() <= 0.4
    found = PhysicalInverse(PENDULUM, kwargs)(states, step_from(env, states, actions))
    np.testing.assert_allclose(found, actions, rtol=1e-9, atol=1e-11)


def test_clipped_actions_come_back_as_the_bound() -> None:
    env = make_env(SHIFTED)
    states = random_pendulum_states(3)
    actions = np.array([[3.0], [-3.9], [1.0]])
    solution = PhysicalInverse(SHIFTED).solve(states, step_from(env, states, actions))
    np.testing.assert_allclose(solution.action, [[2.5], [-3.5], [1.0]], rtol=1e-9)
    assert solution.saturated.tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_clipped_actions_are_told_apart_in_any_precision(dtype: type) -> None:
    env = make_env(PENDULUM)
    states = random_pendulum_states(1000).astype(dtype).astype(np.float64)
    actions = 1.5 * random_actions(env, 1000)
    solution = PhysicalInverse(PENDULUM).solve(states, step_from(env, states, actions).astype(dtype))
    clipped = np.abs(actions).max(axis=1) > 3.0
    assert 0.2 < clipped.mean() < 0.5
    np.testing.assert_array_equal(solution.saturated, clipped)


def test_joint_limits_are_reported() -> None:
    states = np.array([[1.01, 0.0, 1.0, 0.0], [0.0, 1.58, 0.0, 0.0], [0.5, 0.2, 0.0, 0.0]])
    actions = np.ones((3, 1))
    solution = PhysicalInverse(PENDULUM).solve(states, step_from(make_env(PENDULUM), states, actions))
    assert solution.constrained.tolist() == [True, True, False]


def test_dry_friction_is_no_limit(tmp_path: Path) -> None:
    kwargs = {"xml_file": pendulum_xml(tmp_path, 'name="slider"', 'name="slider" frictionloss="2"')}
    env = make_env(PENDULUM, kwargs)
    states = random_pendulum_states(50)
    actions = random_actions(env, 50)
    solution = PhysicalInverse(PENDULUM, kwargs).solve(states, step_from(env, states, actions))
    np.testing.assert_allclose(solution.action, actions, rtol=1e-6, atol=1e-8)
    assert not solution.constrained.any()


def test_transitions_of_another_task_leave_a_residual() -> None:
    states, _, next_states = roll("HalfCheetah-v5", {"frame_skip": 1}, 20)
    shifted = PhysicalInverse("PhysicsShift-v0", {**CHEETAH_SHIFT, "mass": 2.0})
    assert np.median(shifted.solve(states, next_states).residual) > 1e-3


def test_no_rows() -> None:
    assert PhysicalInverse(PENDULUM)(np.empty((0, 4)), np.empty((0, 4))).shape == (0, 1)


@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "message"),
    [
        (
            "InvertedPendulum-v5",
            {"frame_skip": 1},
            "RK4 integrator has no closed-form inverse; use a task with the Euler",
        ),
        ("InvertedPendulum-v5", {}, "frame_skip must be 1, got 2"),
        ("HalfCheetah-v5", {}, "frame_skip must be 1, got 5"),
        ("PhysicsShift-v0", {"task_id": "Hopper-v5", "mass": 2.0}, "frame_skip must be 1, got 4"),
    ],
)
def test_steps_without_an_inverse(env_id: str, env_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{env_id} cannot be inverted: .*{message}"):
        PhysicalInverse(env_id, env_kwargs)


@pytest.mark.parametrize(
    ("actuators", "message"),
    [
        ("", "it has no actuators"),
        ('<muscle joint="slider" lengthrange="0 1" ctrlrange="0 1"/>', "states of their own"),
        ('<general joint="slider" dyntype="filter" dynprm="0.1" ctrlrange="-1 1"/>', "states of their own"),
        ('<motor joint="slider" ctrlrange="-1 1" forcelimited="true" forcerange="-1 1"/>', "forces .* are limited"),
        (
            '<motor joint="slider" ctrlrange="-1 1"/><motor joint="slider" gear="2" ctrlrange="-1 1"/>',
            "2 controls act through 1 independent forces",
        ),
    ],
)
def test_actuators_without_an_inverse(tmp_path: Path, actuators: str, message: str) -> None:
    motor = '<motor ctrllimited="true" ctrlrange="-3 3" gear="100" joint="slider" name="slide"/>'
    with pytest.raises(ConfigError, match=f"cannot be inverted: .*{message}"):
        PhysicalInverse(PENDULUM, {"xml_file": pendulum_xml(tmp_path, motor, actuators)})


@pytest.mark.parametrize(
    ("state", "next_state", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), r"state must have shape \(rows, 4\) for this task, got \(2, 3\)"),
        (np.zeros((2, 4)), np.zeros((3, 4)), "as many rows, got 2 and 3"),
        (np.zeros((2, 4)), np.array([[0.0] * 4, [np.nan] * 4]), "next_state must be finite, row 1 holds"),
    ],
)
def test_bad_rows(state: np.ndarray, next_state: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PhysicalInverse(PENDULUM)(state, next_state)
