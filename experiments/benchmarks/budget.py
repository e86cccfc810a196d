"""Train a model config for as long as a budget of CPU time lasts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from measure import cpu_seconds

from invdyn.models.base import InverseDynamics
from invdyn.models.registry import ModelConfig, build_model
from invdyn.training.checkpoint import load_model
from invdyn.training.distributed import train
from invdyn.training.run_config import RunConfig, TrackingConfig
from invdyn.transitions.store import TransitionStore

PROBE_EPOCHS = 1
VAL_ROWS = 512


@dataclass(frozen=True)
class Trained:
    """A trained model and what it cost.

    Attributes:
        model: in eval mode.
        epochs: passes over the training rows; 0 for a model without steps.
        cpu_s: CPU time of the training itself: loading of the rows, steps and the checkpoint.
    """

    model: InverseDynamics
    epochs: int
    cpu_s: float


def train_within(config: ModelConfig, store: TransitionStore, budget_s: float, seed: int, folder: Path) -> Trained:
    """Train for as many whole epochs as fit the CPU time, at least one; the speed is probed first, in a run of its own.

    The number of epochs must be known at the start, because the learning rate falls over the whole run. Models without
    steps are fitted once, whatever that costs.
    """
    folder = folder / f"{config.name}-{seed}"
    run = RunConfig.for_dataset(
        store,
        folder / "probe",
        model=config,
        training=config.training.replace(num_epochs=PROBE_EPOCHS, seed=seed),
        device="cpu",
        val_rows=VAL_ROWS,
        checkpoints=1,
        tracking=TrackingConfig(mode="disabled"),
    )
    cpu_s = _timed(run)
    if not build_model(run.model, store.state_dim, store.action_dim, store.history, store.horizon).trainable:
        return Trained(load_model(run.run_dir).eval(), 0, cpu_s)
    epochs = max(1, int(budget_s / (cpu_s / PROBE_EPOCHS)))
    run = run.replace(run_dir=str(folder / "full"), training=run.training.replace(num_epochs=epochs))
    cpu_s = _timed(run)
    return Trained(load_model(run.run_dir).eval(), epochs, cpu_s)


def _timed(run: RunConfig) -> float:
    started = cpu_seconds()
    train(run, local=True)
    return cpu_seconds() - started
