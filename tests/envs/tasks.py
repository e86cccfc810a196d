"""What the tests of the tasks share: random transitions, and models with friction and armature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.mujoco import mujoco_env

from invdyn.envs.task import make_env, read_state, unclipped_range, write_state

PENDULUM = "InvertedPendulumIntegrable-v5"
SHIFTED = "InvertedPendulumIntegrableDynamicsShift-v5"

SLIDING_BOX = """
<mujoco>
  <option timestep="0.002" gravity="0 0 -9.81" cone="elliptic"/>
  <worldbody>
    <geom type="plane" size="10 10 1" friction="{friction} 0 0"/>
    <body pos="0 0 0.1">
      <joint type="slide" axis="1 0 0"/>
      <joint name="height" type="slide" axis="0 0 1"/>
      <geom type="box" size="0.1 0.1 0.1" mass="1" friction="{friction} 0 0"/>
    </body>
  </worldbody>
  <actuator><motor joint="height" ctrllimited="true" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


def pendulum_xml(folder: Path, old: str, new: str) -> str:
    """Write a changed copy of Gymnasium's pendulum, and return its path."""
    text = (Path(mujoco_env.__file__).parent / "assets" / "inverted_pendulum.xml").read_text()
    assert old in text
    path = folder / "pendulum.xml"
    path.write_text(text.replace(old, new))
    return str(path)


def random_pendulum_states(num_rows: int, seed: int = 0) -> np.ndarray:
    """States inside the limits, fast ones included (num_rows, 4)."""
    generator = np.random.default_rng(seed)
    return generator.uniform([-0.9, -1.1, -2.0, -6.0], [0.9, 1.1, 2.0, 6.0], (num_rows, 4))


def random_actions(env: gymnasium.Env[Any, Any], num_rows: int, seed: int = 1) -> np.ndarray:
    """Actions that the simulator does not clip, float32."""
    low, high = unclipped_range(env)
    return np.random.default_rng(seed).uniform(low, high, (num_rows, len(low))).astype(np.float32)


def step_from(env: gymnasium.Env[Any, Any], states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """One `env.step` from each state."""
    rows = []
    for state, action in zip(states, actions, strict=True):
        env.reset()
        write_state(env, state)
        env.step(action)
        rows.append(read_state(env))
    return np.stack(rows)


def roll(env_id: str, env_kwargs: dict[str, Any], num_steps: int, episode_steps: int = 25) -> tuple[np.ndarray, ...]:
    """States, actions, next states of random episodes through `env.step`."""
    env = make_env(env_id, env_kwargs)
    actions = random_actions(env, num_steps)
    states, next_states = [], []
    for step, action in enumerate(actions):
        if step % episode_steps == 0:
            env.reset(seed=step)
        states.append(read_state(env))
        env.step(action)
        next_states.append(read_state(env))
    return np.stack(states), actions, np.stack(next_states)
