"""The exact posterior of real steps of the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from invdyn.envs.inverse import PhysicalInverse
from invdyn.envs.posterior import ActionPosterior
from invdyn.envs.replay import SimulatorReplay
from invdyn.envs.task import make_env
from invdyn.errors import ConfigError, DataError
from tests.envs.tasks import PENDULUM, random_actions, random_pendulum_states, step_from

TASKS = {
    "InvertedPendulumTwoFactor-v5": 2,
    "InvertedPendulumAntagonist-v5": 2,
    "InvertedPendulumDeadZone-v5": 1,
}
every_task = pytest.mark.parametrize("env_id", TASKS)


def transitions(env_id: str, rows: int, env_kwargs: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    env = make_env(env_id, env_kwargs)
    states, actions = random_pendulum_states(rows), random_actions(env, rows)
    return states, actions, step_from(env, states, actions)


@every_task
def test_the_force_of_a_step_is_that_of_its_action(env_id: str) -> None:
    posterior = ActionPosterior(env_id)
    states, actions, next_states = transitions(env_id, 300)
    assert (posterior.state_dim, posterior.action_dim) == (4, TASKS[env_id]) == (4, actions.shape[1])
    np.testing.assert_allclose(posterior.force(states, next_states), posterior.force_of(actions), atol=1e-10)
    single = posterior.force(states.astype(np.float32), next_states.astype(np.float32))
    np.testing.assert_allclose(single, posterior.force_of(actions), atol=1e-5)


@every_task
def test_every_sample_leads_to_the_next_state(env_id: str) -> None:
    states, actions, next_states = transitions(env_id, 100)
    samples = ActionPosterior(env_id).sample(states, next_states, 7, np.random.default_rng(0))
    assert samples.shape == (7, *actions.shape)
    replay = SimulatorReplay(env_id)
    for sample in samples:
        np.testing.assert_allclose(replay(states, sample), next_states, atol=1e-9)
    spread = np.ptp(samples, axis=0).max(axis=1)
    assert (spread > 0.05).mean() > 0.4  # where the dead zone or saturation hides nothing, the action is a point


@every_task
def test_the_recorded_action_is_one_sample_of_it(env_id: str) -> None:
    """Over many steps the recorded actions and one draw for each have the same joint distribution with the force."""
    posterior = ActionPosterior(env_id)
    states, actions, next_states = transitions(env_id, 2000)
    force = posterior.force(states, next_states)
    drawn = posterior.sample(states, next_states, 1, np.random.default_rng(0))[0]
    for statistic in (lambda a: a[:, 0], lambda a: a[:, 0] * force, lambda a: a[:, 0] ** 2, lambda a: np.abs(a[:, -1])):
        recorded, sampled = statistic(actions.astype(np.float64)), statistic(drawn)
        error = np.hypot(recorded.std(), sampled.std()) / np.sqrt(2000)
        assert abs(recorded.mean() - sampled.mean()) < 4 * error


@pytest.mark.parametrize("env_id", list(TASKS)[:2])
def test_the_mean_log_density_of_recorded_actions_is_the_negative_entropy(env_id: str) -> None:
    posterior = ActionPosterior(env_id)
    states, actions, next_states = (values.astype(np.float32) for values in transitions(env_id, 2000))
    density, entropy = posterior.log_prob(states, actions, next_states), posterior.entropy(states, next_states)
    assert np.isfinite(density).all()
    assert density.mean() == pytest.approx(-entropy.mean(), abs=4 * density.std() / np.sqrt(2000))
    assert (posterior.log_prob(states, 0.7 * actions, next_states) == -np.inf).all()


def test_actions_out_of_bounds_have_no_density() -> None:
    posterior = ActionPosterior("InvertedPendulumAntagonist-v5")
    states, _, next_states = transitions("InvertedPendulumAntagonist-v5", 50)
    difference = posterior.force(states, next_states) / 3.0
    beyond = np.stack([1.1 + np.maximum(difference, 0), 1.1 + np.maximum(difference, 0) - difference], axis=1)
    np.testing.assert_allclose(posterior.force_of(beyond), 3.0 * difference)
    assert (posterior.log_prob(states, beyond, next_states) == -np.inf).all()


def test_changed_physics_are_inverted_too() -> None:
    kwargs = {"task_id": "InvertedPendulumTwoFactor-v5", "mass": 1.7, "damping": 2.0}
    states, actions, next_states = transitions("PhysicsShift-v0", 50, kwargs)
    assert actions.shape == (50, 2)
    posterior = ActionPosterior("PhysicsShift-v0", kwargs)
    np.testing.assert_allclose(posterior.force(states, next_states), posterior.force_of(actions), atol=1e-10)
    shifted = SimulatorReplay("PhysicsShift-v0", {**kwargs, "action_offset": [0.1, -0.2]})
    np.testing.assert_array_equal(
        shifted(states, actions.astype(np.float64)),
        SimulatorReplay("PhysicsShift-v0", kwargs)(states, actions.astype(np.float64) + np.array([0.1, -0.2])),
    )


@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "message"),
    [
        (PENDULUM, {}, "needs a task with an actuation, such as InvertedPendulumTwoFactor-v5; got InvertedPendulumInt"),
        ("InvertedPendulumTwoFactor-v5", {"action_offset": 0.1}, "needs actions that nothing shifts"),
        (
            "PhysicsShift-v0",
            {"task_id": "InvertedPendulumDeadZone-v5", "action_offset": 0.1},
            "needs actions that nothing shifts",
        ),
        ("InvertedPendulumTwoFactor-v5", {"actuation": "two_factors"}, "did you mean 'two_factor'"),
    ],
)
def test_tasks_without_an_exact_posterior(env_id: str, env_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActionPosterior(env_id, env_kwargs)


@every_task
def test_the_point_inverse_says_that_several_actions_are_right(env_id: str) -> None:
    with pytest.raises(ConfigError, match="several of its actions have the same effect; ActionPosterior has all"):
        PhysicalInverse(env_id)


def test_bad_arguments() -> None:
    posterior = ActionPosterior("InvertedPendulumTwoFactor-v5")
    states = np.zeros((2, 4))
    with pytest.raises(ConfigError, match="num_samples must be 1 or more, got 0"):
        posterior.sample(states, states, 0, np.random.default_rng(0))
    with pytest.raises(DataError, match=r"action must have shape \(rows, 2\)"):
        posterior.log_prob(states, np.zeros((2, 1)), states)
    with pytest.raises(DataError, match="action must have as many rows as state, got 3 and 2"):
        posterior.log_prob(states, np.zeros((3, 2)), states)
    with pytest.raises(DataError, match=r"action must have shape \(..., 2\) for this task, got \(2, 3\)"):
        posterior.force_of(np.zeros((2, 3)))
