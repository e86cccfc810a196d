"""Synthetic recordings whose every property is known, as arrays and as native shards."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from invdyn.doctor.sample import Sample
from invdyn.doctor.values import Names

NAMES = Names(tuple(f"state {i}" for i in range(8)), ("action 0", "action 1"))


def record(num_episodes=40, num_steps=60, *, delay=0, seed=0, spread=1.0):
    """Two damped masses pushed by a smooth random force: (x0, x1, v0, v1), v' = 0.9 v + 0.1 a_{t - delay}.

    The inverse is exactly linear. Returns a list of (T + 1, 4) states and of (T, 2) actions.
    """
    generator = np.random.default_rng(seed)
    force = np.zeros((num_steps, num_episodes, 2))
    for step in range(1, num_steps):
        force[step] = 0.8 * force[step - 1] + generator.normal(size=(num_episodes, 2))
    force[0] = generator.normal(size=(num_episodes, 2))
    states = np.zeros((num_steps + 1, num_episodes, 4))
    states[0] = spread * generator.normal(size=(num_episodes, 4))
    for step in range(num_steps):
        acting = force[step - delay] if step >= delay else 0.0
        velocity = 0.9 * states[step, :, 2:] + 0.1 * acting
        states[step + 1] = np.concatenate([states[step, :, :2] + 0.1 * velocity, velocity], axis=1)
    return list(states.transpose(1, 0, 2)), list(force.transpose(1, 0, 2))


def sample(states, actions, split=None):
    return Sample.of_episodes(states, actions, split)


def write_shards(folder: Path, states, actions, num_shards=2):
    """Write native shards, the episodes in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, chosen in enumerate(np.array_split(np.arange(len(states)), num_shards)):
        with h5py.File(folder / f"shard-{index:05d}.hdf5", "w") as file:
            file["data/state"] = np.concatenate([states[i] for i in chosen])
            file["data/action"] = np.concatenate([actions[i] for i in chosen]).astype(np.float32)
            file["meta/episode_ends"] = np.cumsum([len(actions[i]) for i in chosen])
            file["meta/state_ends"] = np.cumsum([len(states[i]) for i in chosen])
    return folder
