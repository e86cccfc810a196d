"""Episodes of exploration, and the shard that holds them. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Bool, Float32, Float64

from invdyn.envs.collect_config import CollectConfig, DimensionRanges
from invdyn.envs.policies import Policy, action_range, start_policy
from invdyn.envs.shards import Shard, shard_path, write_shard
from invdyn.envs.task import OpenLoopSimulator, action_dim, make_env, mujoco_env, read_state, unclipped_range
from invdyn.errors import ConfigError

MAX_ATTEMPTS = 1000
_BAD = mujoco.mjtWarning
_DIVERGED = [int(kind) for kind in (_BAD.mjWARN_BADQPOS, _BAD.mjWARN_BADQVEL, _BAD.mjWARN_BADQACC)]
_FIRST_CHUNK, _LAST_CHUNK = 16, 256


@dataclass(frozen=True)
class Episode:
    """One recorded episode.

    Attributes:
        state: (steps + 1, state_dim), float64.
        action: (steps, action_dim), float32, as passed to `env.step`.
        num_attempts: starts it took to get at least one step inside the limits.
    """

    state: Float64[np.ndarray, "states state_dim"]
    action: Float32[np.ndarray, "steps action_dim"]
    num_attempts: int


@dataclass(frozen=True)
class ShardRecord:
    """What a task reports of a finished shard.

    Attributes:
        path: the file.
        num_episodes: episodes in it.
        num_steps: transitions in it.
        num_retries: starts thrown away because no step stayed inside the limits.
        num_limit_states: states on or beyond a joint limit of the model, where the inverse is badly conditioned.
    """

    path: str
    num_episodes: int
    num_steps: int
    num_retries: int
    num_limit_states: int


class EpisodeRecorder:
    """Record the episodes of a config, each from its own seed and so in any order."""

    def __init__(self, config: CollectConfig) -> None:
        """Make the task, and check the config against it.

        Raises:
            ConfigError: when the task cannot be made, or ranges do not fit its state or action.
        """
        self._config = config
        env_id, env_kwargs = config.task
        self._env = make_env(env_id, _with_reset_noise(config, env_kwargs))
        self._model = mujoco_env(self._env).model
        self._state_dim = self._model.nq + self._model.nv
        self._limits = dimension_bounds("state_limits", config.state_limits, self._state_dim)
        self._start = dimension_bounds("reset.state_range", config.reset.state_range, self._state_dim)
        self._action_range = action_range(config.policy, *unclipped_range(self._env))
        # The C loop never sees the task's own `terminated`.
        may_run_ahead = not config.end_at_termination or getattr(self._env.unwrapped, "never_terminates", False)
        self._simulator = OpenLoopSimulator.for_env(self._env) if may_run_ahead else None

    def record(self, episode: int) -> Episode:
        """Record one episode, the same whichever were recorded before.

        Raises:
            ConfigError: when no start leads to a step inside the limits.
        """
        for attempt in range(MAX_ATTEMPTS):
            key = (episode, attempt) if attempt else (episode,)
            sequence = np.random.SeedSequence(self._config.seed, spawn_key=key)
            generator = np.random.Generator(np.random.PCG64(sequence))
            self._reset(generator)
            start = read_state(self._env)
            if not self._inside(start[None])[0]:
                continue
            states, actions = self._run(start_policy(self._config.policy, generator, *self._action_range))
            if len(actions):
                return Episode(np.concatenate([start[None], states]), actions, attempt + 1)
        raise ConfigError(
            f"state_limits must leave room for one step; episode {episode} had none from {MAX_ATTEMPTS} starts: "
            "widen state_limits or narrow reset"
        )

    @property
    def dt_s(self) -> float:
        """Seconds from one state to the next."""
        return float(mujoco_env(self._env).dt)

    def close(self) -> None:
        """Free the task."""
        self._env.close()

    def count_limit_states(self, states: Float64[np.ndarray, "states state_dim"]) -> int:
        """Count states with a hinge or slide joint on or beyond its limit."""
        model, free = self._model, (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE)
        limited = model.jnt_limited.astype(bool) & np.isin(model.jnt_type, [int(kind) for kind in free])
        positions = states[:, model.jnt_qposadr[limited]]
        low, high = model.jnt_range[limited].T
        return int(((positions <= low) | (positions >= high)).any(axis=1).sum())

    def _reset(self, generator: np.random.Generator) -> None:
        self._env.reset(seed=int(generator.integers(2**32)))
        if self._config.reset.state_range is None:
            return
        low, high = self._start
        chosen = np.isfinite(low)
        state = read_state(self._env)
        state[chosen] = generator.uniform(low[chosen], high[chosen])
        base = mujoco_env(self._env)
        mujoco.mj_normalizeQuat(self._model, state[: self._model.nq])
        base.set_state(state[: self._model.nq], state[self._model.nq :])

    def _run(self, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
        """Act until a limit, the end of the task, or the last step; returns (states after each action, actions)."""
        states, actions = [np.empty((0, self._state_dim))], [np.empty((0, action_dim(self._env)), np.float32)]
        remaining, size = self._config.max_episode_steps, _FIRST_CHUNK
        while remaining:
            chunk = policy.draw(min(size, remaining))
            reached, goes_on = self._advance(chunk)
            inside = self._inside(reached)
            num_kept = len(reached) if inside.all() else int(inside.argmin())
            states.append(reached[:num_kept])
            actions.append(chunk[:num_kept])
            if not goes_on or num_kept < len(chunk):
                break
            remaining, size = remaining - len(chunk), min(2 * size, _LAST_CHUNK)
        return np.concatenate(states), np.concatenate(actions)

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, bool]:
        """Apply actions; returns the states that may be recorded, and whether the episode goes on."""
        if self._simulator is None:
            return self._step_through(actions)
        saved = self._simulator.save()
        states = self._simulator.run(actions)
        if not self._simulator.warned:
            return states, True
        # A run that MuJoCo warned of may have been reset on the way: find the step where it happened.
        self._simulator.restore(saved)
        return self._step_through(actions)

    def _step_through(self, actions: np.ndarray) -> tuple[np.ndarray, bool]:
        states = np.empty((len(actions), self._state_dim))
        for step, action in enumerate(actions):
            _, _, terminated, _, _ = self._env.step(action)
            if _diverged(mujoco_env(self._env).data):
                return states[:step], False
            states[step] = read_state(self._env)
            if terminated and self._config.end_at_termination:
                return states[: step + 1], False
            if not self._inside(states[step][None])[0]:
                return states[: step + 1], False
        return states, True

    def _inside(self, states: Float64[np.ndarray, "states state_dim"]) -> Bool[np.ndarray, " states"]:
        low, high = self._limits
        return np.asarray(((states > low) & (states < high)).all(axis=1))


def collect_shard(
    config: CollectConfig,
    folder: str | Path,
    shard_index: int,
    on_episode: Callable[[int], None] | None = None,
) -> ShardRecord:
    """Record the episodes of one shard and write its file; the file is the same on any machine of one kind.

    Args:
        config: what to record.
        folder: where the shards are.
        shard_index: which shard.
        on_episode: called after each episode with its number of steps.

    Raises:
        ConfigError: when the config does not fit the task.
        DataError: when the file cannot be written.
    """
    recorder = EpisodeRecorder(config)
    episodes = []
    for number in config.episodes_of(shard_index):
        episodes.append(recorder.record(number))
        if on_episode is not None:
            on_episode(len(episodes[-1].action))
    path = shard_path(folder, shard_index)
    shard = Shard.of([episode.state for episode in episodes], [episode.action for episode in episodes])
    num_limit_states = recorder.count_limit_states(shard.state)
    recorder.close()
    write_shard(path, shard, config, recorder.dt_s)
    num_retries = sum(episode.num_attempts - 1 for episode in episodes)
    return ShardRecord(str(path), len(episodes), len(shard.action), num_retries, num_limit_states)


def dimension_bounds(
    name: str, ranges: DimensionRanges | None, state_dim: int
) -> tuple[Float64[np.ndarray, " state_dim"], Float64[np.ndarray, " state_dim"]]:
    """Return lower and upper bounds per state dimension, infinite where there is none.

    Raises:
        ConfigError: when a dimension does not exist, or a range is empty.

    Example:
        >>> dimension_bounds("state_limits", {0: 0.95, 2: (-1.0, 2.0)}, 3)
        (array([-0.95,  -inf, -1.  ]), array([0.95,  inf, 2.  ]))
    """
    low, high = np.full(state_dim, -np.inf), np.full(state_dim, np.inf)
    items: dict[int, Any] = dict(enumerate(ranges)) if isinstance(ranges, tuple) else dict(ranges or {})
    if isinstance(ranges, tuple) and len(ranges) != state_dim:
        raise ConfigError(f"{name} must list {state_dim} ranges, one per dimension of the state, got {len(ranges)}")
    for index, value in items.items():
        if not 0 <= index < state_dim:
            raise ConfigError(f"{name} must name dimensions from 0 to {state_dim - 1}, got {index}")
        if value is None:
            continue
        low[index], high[index] = value if isinstance(value, tuple) else (-value, value)
        if not low[index] < high[index]:
            found = [float(low[index]), float(high[index])]
            raise ConfigError(f"{name}.{index} must be [low, high] with low < high, got {found}")
    return low, high


def _with_reset_noise(config: CollectConfig, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the task's arguments with the config's reset noise among them."""
    if config.reset.noise_scale is None:
        return env_kwargs
    noise = {"reset_noise_scale": config.reset.noise_scale}
    if config.physics.changes:
        return {**env_kwargs, "task_kwargs": {**env_kwargs["task_kwargs"], **noise}}
    return {**env_kwargs, **noise}


def _diverged(data: mujoco.MjData) -> bool:
    """Return whether MuJoCo found a value that is not finite, or huge, and so reset itself."""
    return bool(data.warning.number[_DIVERGED].any())
