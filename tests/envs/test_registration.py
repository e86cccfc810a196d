from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

import invdyn.envs  # noqa: F401
from invdyn.envs.registration import register
from invdyn.envs.task import make_env
from invdyn.errors import ConfigError

IDS = ("InvertedPendulumIntegrable-v5", "InvertedPendulumIntegrableDynamicsShift-v5", "PhysicsShift-v0")
MANY_VALUED = ("InvertedPendulumTwoFactor-v5", "InvertedPendulumAntagonist-v5", "InvertedPendulumDeadZone-v5")


@pytest.mark.parametrize("env_id", [*IDS, *MANY_VALUED])
def test_import_registers(env_id: str) -> None:
    assert isinstance(gymnasium.spec(env_id), EnvSpec)


def test_registering_again_changes_nothing() -> None:
    before = dict(gymnasium.registry)
    register()
    assert dict(gymnasium.registry) == before


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        *((env_id, {}) for env_id in (*IDS[:2], *MANY_VALUED)),
        (IDS[2], {"task_id": "HalfCheetah-v5", "mass": 1.2, "action_offset": 0.1}),
    ],
)
def test_gymnasium_makes_resets_and_steps(env_id: str, kwargs: dict[str, object]) -> None:
    env = gymnasium.make(env_id, **kwargs)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
    assert np.isfinite(observation).all()
    assert not terminated
    assert not truncated


def test_unknown_id_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"registered Gymnasium id.*did you mean 'InvertedPendulumIntegrable-v5'"):
        make_env("InvertedPendulumIntegrabel-v5")


def test_modules_named_in_an_id_are_never_imported() -> None:
    with pytest.raises(ConfigError, match="registered Gymnasium id"):
        make_env("antigravity:InvertedPendulum-v5")


def test_unknown_argument_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^InvertedPendulum-v5 cannot be made with env_kwargs .*colour.*$"):
        make_env("InvertedPendulum-v5", {"colour": 1})


@pytest.mark.parametrize("frame_skip", [0, -1, 1.5])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_frame_skip_that_is_no_number_of_steps(frame_skip: float, shifted: bool) -> None:
    kwargs = {"frame_skip": frame_skip}
    with pytest.raises(ConfigError, match=f"frame_skip must be a whole number, 1 or more, got {frame_skip}"):
        if shifted:
            make_env("PhysicsShift-v0", {"task_id": "HalfCheetah-v5", "task_kwargs": kwargs, "mass": 2.0})
        else:
            make_env("InvertedPendulumIntegrable-v5", kwargs)


def test_other_simulators_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be a Gymnasium MuJoCo task, got CartPole"):
        make_env("CartPole-v1")


def test_mujoco_leaves_no_log_file(tmp_cwd: object) -> None:
    from pathlib import Path

    make_env("HalfCheetah-v5")  # its model has an attribute that MuJoCo warns of
    assert not list(Path.cwd().iterdir())
