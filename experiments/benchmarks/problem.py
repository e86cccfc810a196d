"""The clean pendulum in memory, for benchmarks: recorded and extracted once per run into a temporary folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from invdyn.config import load_config
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.store import TransitionStore

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

from collect import record  # noqa: E402 - a sibling script, not a package

COLUMNS = ("state", "action", "next_state")


def pendulum(folder: str, num_episodes: int | None = None) -> TransitionStore:
    """Record and extract the clean pendulum.

    Args:
        folder: where.
        num_episodes: episodes to record; as many as the config says when None.
    """
    overrides = [f"buffer_path={folder}/sequence/pendulum"]
    if num_episodes is not None:
        overrides.append(f"collect.num_episodes={num_episodes}")
    config = load_config(DatasetConfig, ROOT / "configs" / "dataset" / "pendulum_integrable.yaml", overrides)
    assert config.collect is not None
    record(config, config.collect, local=True)
    return create_dataset(config, local=True)


def tensors(store: TransitionStore, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return state, action and next_state of a split."""
    columns = store.load(split, columns=COLUMNS)
    state, action, next_state = (torch.from_numpy(columns[name]) for name in COLUMNS)
    return state, action, next_state
