"""A small dataset with a known inverse, and short runs on it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from invdyn.models.registry import parse_model_config
from invdyn.training.run_config import RunConfig
from invdyn.training.worker import Worker
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.store import TransitionStore

EPISODES, STEPS = 60, 40
TIMES = ("steps_per_s", "elapsed_s")
FLOW = {
    "_target_": "invdyn.models.FlowInverseDynamics",
    "name": "tiny",
    "network": "mlp",
    "prediction": "target",
    "diffusion_step_embed_dim": 4,
    "down_dims": [16, 16],
    "num_inference_steps": 2,
}
TWO_STAGES = {
    **FLOW,
    "prediction": "angular",
    "base": "mlp",
    "base_dims": [8, 8],
    "base_gates": 4,
    "base_tails": 2.0,
    "down_dims": [8, 8],
}
LINEAR = {"_target_": "invdyn.models.LinearInverse", "name": "linear"}
RECIPE = {"batch_size": 64, "learning_rate": 1e-2, "num_epochs": 4, "ema_decay": 0.99}
CPU = Worker(torch.device("cpu"), echo=False)


def write_recording(folder: Path, *, seed: int = 0, action_dim: int = 1) -> None:
    """Write one native shard of s' = s + (a + 0.25 sin(3 a)), which is monotonic in a: the inverse is a function."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    actions = random.uniform(-2, 2, (EPISODES, STEPS, action_dim)).astype(np.float32)
    moved = (actions + 0.25 * np.sin(3 * actions)).sum(axis=2)
    direction = np.array([1.0, -0.5])
    states = np.zeros((EPISODES, STEPS + 1, 2))
    states[:, 0] = random.normal(size=(EPISODES, 2))
    states[:, 1:] = states[:, :1] + np.cumsum(moved, axis=1)[..., None] * direction
    with h5py.File(folder / "shard-00000.hdf5", "w") as file:
        file["data/state"] = states.reshape(-1, 2)
        file["data/action"] = actions.reshape(-1, action_dim)
        file["meta/episode_ends"] = np.arange(1, EPISODES + 1) * STEPS
        file["meta/state_ends"] = np.arange(1, EPISODES + 1) * (STEPS + 1)


def dataset_config(folder: Path, **options: Any) -> DatasetConfig:
    values = {"name": "tiny", "buffer_path": str(folder / "sequence/tiny"), "val_ratio": 0.15, "test_ratio": 0.15}
    return DatasetConfig(**{**values, **options})


def make_dataset(folder: Path, *, seed: int = 0, action_dim: int = 1, **options: Any) -> TransitionStore:
    """Record and extract in this process; the dataset has several parts."""
    config = dataset_config(folder, part_size_mb=0.01, **options)
    write_recording(Path(config.sequence_path), seed=seed, action_dim=action_dim)
    create_dataset(config, local=True)
    return TransitionStore(config.transitions_path)


def run_config(
    store: TransitionStore, run_dir: str | Path, model: dict[str, Any] | None = None, **values: Any
) -> RunConfig:
    """Return a short run; recipe keys may be given among the values."""
    recipe = {key: values.pop(key, default) for key, default in {**RECIPE, **_recipe_keys(values)}.items()}
    parsed = parse_model_config({**(model or FLOW), "training": recipe}, where="test")
    values = {"device": "cpu", "tracking": {"mode": "disabled"}, **values}
    return RunConfig.for_dataset(store, run_dir, model=parsed, training=parsed.training, **values)


def _recipe_keys(values: dict[str, Any]) -> dict[str, Any]:
    from invdyn.models.recipe import TrainingRecipe

    return {key: value for key, value in values.items() if key in TrainingRecipe.model_fields}


def read_metrics_csv(run_dir: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without the columns that measure time."""
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [{name: row[name] for name in row if name not in TIMES} for row in csv.DictReader(file)]


def assert_same_values(found: Any, expected: Any) -> None:
    """Compare nested trainer states bit for bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same_values(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same_values(*pair)
    else:
        assert found == expected


def assert_same_run(found: Path, expected: Path) -> None:
    """Two runs ended with the same weights, moving average, optimizer and losses, bit for bit."""
    from invdyn.training.checkpoint import list_checkpoints, load_trainer_state

    assert read_metrics_csv(found) == read_metrics_csv(expected)
    ours, theirs = list_checkpoints(found)[-1], list_checkpoints(expected)[-1]
    assert ours.name == theirs.name
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    states = [load_trainer_state(folder, torch.device("cpu")) for folder in (ours, theirs)]
    assert_same_values(*states)
