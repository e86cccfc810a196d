"""Small recordings of the integrable pendulum, and datasets made from them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import h5py
import numpy as np

import invdyn.envs  # noqa: F401  registers the tasks
from invdyn.envs.replay import SimulatorReplay
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.store import TransitionStore

ENV_ID = "InvertedPendulumIntegrableDynamicsShift-v5"
ENV_KWARGS = {"action_offset": 0.25}
EPISODES, STEPS = 60, 15


def record_pendulum(path: Path, *, name_env: bool = True) -> None:
    """Write one native shard of random actions from small random states, away from the joint limits."""
    generator = np.random.default_rng(0)
    replay = SimulatorReplay(ENV_ID, ENV_KWARGS)
    actions = generator.uniform(-0.5, 0.5, (STEPS, EPISODES, 1)).astype(np.float32)
    states = [generator.uniform(-0.1, 0.1, (EPISODES, 4))]
    for step in range(STEPS):
        states.append(replay(states[-1], actions[step]))
    write_native(
        path,
        np.stack(states, axis=1),
        actions.swapaxes(0, 1),
        {"env_id": ENV_ID, "env_kwargs": json.dumps(ENV_KWARGS), "dt_s": 0.02} if name_env else {},
    )


def write_native(path: Path, states: np.ndarray, actions: np.ndarray, attributes: dict[str, str | float]) -> None:
    """Write (episodes, steps + 1, state_dim) states and (episodes, steps, action_dim) actions as one shard."""
    path.mkdir(parents=True)
    episodes, steps = actions.shape[:2]
    with h5py.File(path / "shard-00000.hdf5", "w") as file:
        file["data/state"] = states.reshape(-1, states.shape[-1])
        file["data/action"] = actions.reshape(-1, actions.shape[-1])
        file["meta/episode_ends"] = np.arange(1, episodes + 1) * steps
        file["meta/state_ends"] = np.arange(1, episodes + 1) * (steps + 1)
        file.attrs.update(attributes)


def extract(sequences: Path, **options: float) -> TransitionStore:
    """Make the dataset of a recording in this process."""
    values = {"buffer_path": str(sequences), "name": sequences.name, "val_ratio": 0.2, "test_ratio": 0.3, **options}
    output = Path(tempfile.mkdtemp(dir=sequences.parent)) / "transitions"
    config = DatasetConfig(**values, output_path=str(output))
    create_dataset(config, local=True)
    return TransitionStore(config.transitions_path)
