"""The simulated step against the closed form of the cart-pole, with each multiplier in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest

from invdyn.envs.physics import PhysicsShift
from invdyn.envs.task import make_env, mujoco_env, read_state, write_state
from invdyn.errors import ConfigError
from tests.envs.tasks import (
    PENDULUM,
    SHIFTED,
    SLIDING_BOX,
    pendulum_xml,
    random_actions,
    random_pendulum_states,
    step_from,
)

GRAVITY, DT_S = 9.81, 0.02


def closed_form(
    state: np.ndarray,
    action: np.ndarray,
    *,
    mass: float = 1.0,
    gear: float = 1.0,
    damping: float = 1.0,
    armature: float = 0.0,
    offset: float = 0.0,
) -> np.ndarray:
    """One semi-implicit Euler step, damping implicit, of a cart with a pole; `armature` in kg and kg m2."""
    model = mujoco_env(make_env(PENDULUM)).model
    cart_mass, pole_mass = mass * model.body_mass[1:]
    rotation = np.empty(9)
    mujoco.mju_quat2Mat(rotation, model.body_iquat[2])
    rotation = rotation.reshape(3, 3)
    inertia = mass * (rotation @ np.diag(model.body_inertia[2]) @ rotation.T)[1, 1]
    center_x, _, center_z = model.body_ipos[2]
    position, velocity = state[:2], state[2:]
    sine, cosine = np.sin(position[1]), np.cos(position[1])
    ahead, above = center_x * cosine + center_z * sine, center_z * cosine - center_x * sine
    coupling = pole_mass * above
    hinge_inertia = inertia + pole_mass * (center_x**2 + center_z**2)
    mass_matrix = np.array([[cart_mass + pole_mass, coupling], [coupling, hinge_inertia]]) + armature * np.eye(2)
    force = 100.0 * gear * np.clip(action[0] + offset, -3.0, 3.0)
    forces = np.array([force + pole_mass * ahead * velocity[1] ** 2, pole_mass * GRAVITY * ahead]) - damping * velocity
    acceleration = np.linalg.solve(mass_matrix + DT_S * damping * np.eye(2), forces)
    next_velocity = velocity + DT_S * acceleration
    return np.concatenate([position + DT_S * next_velocity, next_velocity])


@pytest.mark.parametrize(
    "physics",
    [{}, {"mass": 1.7}, {"gear": 0.6}, {"damping": 4.0}, {"mass": 0.5, "gear": 1.3, "damping": 0.0}],
    ids=str,
)
def test_step_equals_the_closed_form(physics: dict[str, float]) -> None:
    env = PhysicsShift(make_env(PENDULUM), **physics)
    states = random_pendulum_states(20)
    actions = random_actions(env, 20).astype(np.float64)
    expected = [closed_form(state, action, **physics) for state, action in zip(states, actions, strict=True)]
    np.testing.assert_allclose(step_from(env, states, actions), expected, rtol=1e-12, atol=1e-12)


def test_armature_equals_the_closed_form(tmp_path: Path) -> None:
    task = {"xml_file": pendulum_xml(tmp_path, 'armature="0"', 'armature="0.2"')}
    env = PhysicsShift(make_env(PENDULUM, task), armature=3.0)
    states = random_pendulum_states(20)
    actions = random_actions(env, 20).astype(np.float64)
    expected = [closed_form(state, action, armature=0.6) for state, action in zip(states, actions, strict=True)]
    np.testing.assert_allclose(step_from(env, states, actions), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 1.5])
def test_friction_of_a_sliding_box(tmp_path: Path, multiplier: float) -> None:
    path = tmp_path / "box.xml"
    path.write_text(SLIDING_BOX.format(friction=0.4))
    env = PhysicsShift(make_env(PENDULUM, {"xml_file": str(path)}), friction=multiplier)
    env.reset(seed=0)
    start = np.array([0.0, 0.0, 4.0, 0.0])
    write_state(env, start)
    for _ in range(250):
        env.step(np.zeros(1))
    # The box hops a little, so the normal force is not the weight at all times: compare impulses.
    lost, rise = 4.0 - read_state(env)[2], read_state(env)[3]
    assert lost / (GRAVITY * 250 * 0.002 + rise) == pytest.approx(0.4 * multiplier, rel=0.01)


@pytest.mark.parametrize(
    "make", [lambda: make_env(SHIFTED), lambda: PhysicsShift(make_env(PENDULUM), action_offset=0.5)]
)
def test_offset_is_added_to_the_action_then_clipped(make: Any) -> None:
    env = make()
    states = random_pendulum_states(4)
    actions = np.array([[-3.0], [1.0], [2.5], [3.0]])
    expected = [closed_form(state, action, offset=0.5) for state, action in zip(states, actions, strict=True)]
    np.testing.assert_allclose(step_from(env, states, actions), expected, rtol=1e-12, atol=1e-12)


def test_offset_of_the_shifted_task_can_be_chosen() -> None:
    states, actions = random_pendulum_states(4), np.full((4, 1), 0.25)
    shifted = step_from(make_env(SHIFTED, {"action_offset": -0.75}), states, actions)
    assert np.array_equal(shifted, step_from(make_env(PENDULUM), states, actions - 0.75))


def test_constants_that_depend_on_masses_follow() -> None:
    model, heavy = (
        mujoco_env(make_env("HalfCheetah-v5")).model,
        mujoco_env(PhysicsShift(make_env("HalfCheetah-v5"), mass=2.0)).model,
    )
    np.testing.assert_allclose(heavy.body_subtreemass, 2.0 * model.body_subtreemass)
    assert (heavy.body_invweight0[1:, 0] < 0.8 * model.body_invweight0[1:, 0]).all()


def test_multipliers_of_one_change_no_bit() -> None:
    states = random_pendulum_states(10)
    env = make_env(PENDULUM)
    actions = random_actions(env, 10)
    assert np.array_equal(step_from(PhysicsShift(make_env(PENDULUM)), states, actions), step_from(env, states, actions))


def test_registered_shift_equals_the_wrapper() -> None:
    values = {"mass": 1.3, "friction": 0.5, "armature": 2.0, "gear": 0.9, "action_offset": 0.1}
    made = gymnasium.make("PhysicsShift-v0", task_id="HalfCheetah-v5", **values)
    wrapped = PhysicsShift(make_env("HalfCheetah-v5"), **values)
    states = [read_state(wrapped)]
    actions = random_actions(wrapped, 1)
    assert np.array_equal(step_from(made, states, actions), step_from(wrapped, states, actions))


def test_pendulum_never_terminates_by_its_angle() -> None:
    env = make_env(PENDULUM)
    env.reset(seed=0)
    write_state(env, np.array([0.0, 1.1, 0.0, 0.0]))
    _, reward, terminated, truncated, _ = env.step(np.zeros(1))
    assert (reward, terminated, truncated) == (0, False, False)


def test_nothing_to_multiply_is_an_error() -> None:
    with pytest.raises(ConfigError, match="armature multiplier must be 1 for a task that has no armature, got 2"):
        PhysicsShift(make_env(PENDULUM), armature=2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"mass": 0.0}, "mass: .* greater than 0"), ({"action_offset": [1.0, 2.0]}, "one number or 1 numbers, got 2")],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PhysicsShift(make_env(PENDULUM), **values)


def test_write_state_forgets_the_past() -> None:
    env = make_env("HalfCheetah-v5")
    env.reset(seed=0)
    for action in random_actions(env, 30):
        env.step(action)
    state = read_state(env)
    actions = random_actions(env, 5, seed=2)
    fresh = make_env("HalfCheetah-v5")
    fresh.reset(seed=5)
    futures = []
    for each in (env, fresh):
        write_state(each, state)
        for action in actions:
            each.step(action)
        futures.append(read_state(each))
    assert np.array_equal(*futures)


def test_write_state_checks_the_length() -> None:
    with pytest.raises(ConfigError, match=r"state must have shape \(4,\), got \(3,\)"):
        write_state(make_env(PENDULUM), np.zeros(3))
