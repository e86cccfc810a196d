"""The problems that benchmarks run on: recorded and extracted where the caller says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import torch
from torch import Tensor

from invdyn.config import load_config
from invdyn.envs.shards import MARKER_NAME, list_shards
from invdyn.errors import DataError
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.store import MANIFEST, TransitionStore

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

from collect import record  # noqa: E402 - a sibling script, not a package

COLUMNS = ("state", "action", "next_state")


def problem(name: str, folder: str | Path, num_episodes: int | None = None) -> TransitionStore:
    """Record and extract a dataset of configs/dataset/ in this process; what is finished is not made again.

    Args:
        name: of the dataset config.
        folder: where; it will hold `sequence/NAME` and `inverse_dynamics/NAME`.
        num_episodes: episodes to record; as many as the config says when None.
    """
    overrides = [f"buffer_path={folder}/sequence/{name}"]
    if num_episodes is not None:
        overrides.append(f"collect.num_episodes={num_episodes}")
    config = load_config(DatasetConfig, ROOT / "configs" / "dataset" / f"{name}.yaml", overrides)
    assert config.collect is not None
    if not holds_finished_recording(config):
        print(record(config, config.collect, local=True), file=sys.stderr)
    if (Path(config.transitions_path) / MANIFEST).exists():
        return TransitionStore(config.transitions_path)
    return create_dataset(config, local=True)


def holds_finished_recording(config: DatasetConfig) -> bool:
    """Return whether the sequences are there, and not of another config."""
    shards = list_shards(config.sequence_path)
    if not shards or (Path(config.sequence_path) / MARKER_NAME).exists():
        return False
    with h5py.File(shards[0]) as file:
        recorded = json.loads(file.attrs["collect"])
    assert config.collect is not None
    if recorded != config.collect.model_dump(mode="json"):
        raise DataError(f"{config.sequence_path} holds a recording of another config; give another folder")
    return True


def pendulum(folder: str, num_episodes: int | None = None) -> TransitionStore:
    """Record and extract the clean pendulum; arguments as in `problem`."""
    return problem("pendulum_integrable", folder, num_episodes)


def tensors(store: TransitionStore, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return state, action and next_state of a split."""
    columns = store.load(split, columns=COLUMNS)
    state, action, next_state = (torch.from_numpy(columns[name]) for name in COLUMNS)
    return state, action, next_state
