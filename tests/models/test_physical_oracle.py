from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from invdyn.envs.posterior import ActionPosterior
from invdyn.errors import ConfigError
from invdyn.models import PhysicalOracle, build_model, parse_model_config
from tests.envs.tasks import PENDULUM, SHIFTED, random_actions, random_pendulum_states, step_from

TWO_FACTOR = "InvertedPendulumTwoFactor-v5"


def transitions(env_id: str, rows: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from invdyn.envs.task import make_env

    env = make_env(env_id)
    states, actions = random_pendulum_states(rows), random_actions(env, rows)
    next_states = step_from(env, states, actions)
    state, action, next_state = (torch.from_numpy(v.astype(np.float32)) for v in (states, actions, next_states))
    return state, action, next_state


@pytest.mark.parametrize("env_id", [PENDULUM, SHIFTED])
def test_the_one_right_action(env_id: str) -> None:
    state, action, next_state = transitions(env_id)
    oracle = PhysicalOracle(4, 1, env_id=env_id)
    samples = oracle.sample(state, next_state, 3)
    torch.testing.assert_close(samples, action.expand(3, -1, -1), rtol=0, atol=2e-5)
    assert oracle.loss(state, action, next_state) < 1e-9
    past = torch.cat([torch.randn(100, 4), state], dim=1)
    with_history = PhysicalOracle(4, 1, env_id=env_id, history=1).sample(past, next_state, 3)
    torch.testing.assert_close(with_history, samples, rtol=0, atol=0)


def test_several_right_actions_are_drawn_from_the_posterior() -> None:
    state, _, next_state = transitions(TWO_FACTOR)
    oracle = PhysicalOracle(4, 2, env_id=TWO_FACTOR)
    first, again, other = (
        oracle.sample(state, next_state, 5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    posterior = ActionPosterior(TWO_FACTOR)
    force = posterior.force(state.numpy(), next_state.numpy())
    np.testing.assert_allclose(posterior.force_of(first.numpy()), np.broadcast_to(force, (5, 100)), atol=1e-5)
    assert 0.3 < (first[..., 0] > 0).double().mean() < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, "HalfCheetah-v5"), "frame_skip must be 1, got 5"),
        ((3, 1, PENDULUM), "PhysicalOracle needs whole states .* has 4 and 1 numbers, the dataset 3 and 1"),
        ((4, 1, TWO_FACTOR), "has 4 and 2 numbers, the dataset 4 and 1"),
    ],
)
def test_tasks_it_cannot_answer_for(arguments: tuple[int, int, str], message: str) -> None:
    state_dim, action_dim, env_id = arguments
    with pytest.raises(ConfigError, match=message):
        PhysicalOracle(state_dim, action_dim, env_id=env_id)


def test_only_one_step_is_inverted() -> None:
    with pytest.raises(ConfigError, match="horizon must be 1, got 2"):
        PhysicalOracle(4, 1, env_id=PENDULUM, horizon=2)


def test_the_config_takes_the_simulator_of_the_recording() -> None:
    config = parse_model_config({"_target_": "invdyn.models.PhysicalOracle"}, where="here")
    with pytest.raises(ConfigError, match="needs the simulator of the recording, which names none; set env_id"):
        build_model(config.for_recording({}), 4, 1)
    recording = {"env_id": SHIFTED, "env_kwargs": json.dumps({"action_offset": -1.0})}
    chosen = config.for_recording(recording)
    assert parse_model_config(chosen.to_values(), where="here") == chosen
    state, action, next_state = transitions(PENDULUM)
    shifted = build_model(chosen, 4, 1).sample(state, next_state)[0]
    torch.testing.assert_close(shifted, action + 1.0, rtol=0, atol=2e-5)
    given = config.replace(env_id=PENDULUM)
    assert given.for_recording(recording) == given
