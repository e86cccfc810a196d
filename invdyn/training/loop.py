"""The train loop that serves one process, DDP workers and sweep trials alike. It knows nothing of Ray."""

from __future__ import annotations

import math
import time

import torch

from invdyn.errors import DataError, TrainingDiverged
from invdyn.models.base import InverseDynamics
from invdyn.models.fitted import FittedModel
from invdyn.models.registry import build_model
from invdyn.training.batches import (
    Batches,
    ResidentBatches,
    Share,
    StreamingBatches,
    encode_rows,
    epoch_generator,
    fits_in_memory,
    load_rows,
)
from invdyn.training.checkpoint import (
    SELECTION_METRIC,
    list_checkpoints,
    read_metrics,
    save_checkpoint,
)
from invdyn.training.run_config import RunConfig
from invdyn.training.tracking import Tracker
from invdyn.training.trainer import Trainer
from invdyn.training.validation import Validation
from invdyn.training.worker import Metrics, Worker, stopping_together
from invdyn.transitions.store import TransitionStore

EVALUATIONS = 20
CONSOLE_INTERVAL_S = 2.0
NOISE_STREAM = 1


def train_loop(config: RunConfig, worker: Worker) -> Metrics:
    """Train a model from its latest checkpoint, or from the start, to the end of its recipe.

    Returns:
        The last row of metrics: epoch, step, train_loss, val_loss, val_nrmse, learning_rate, steps_per_s, elapsed_s.

    Raises:
        DataError: when the dataset is not the one the run was started on, or has no whole batch.
        TrainingDiverged: when the loss is no longer finite.
    """
    store = open_store(config)
    if worker.device.type == "cpu":
        torch.set_num_threads(config.cpu_threads)
    torch.manual_seed(config.training.seed)
    model = build_model(config.model, config.state_dim, config.action_dim, config.history, config.horizon)
    with stopping_together(worker):
        model.fit_normalization(store.moments)
        model.to(worker.device)
        validation = Validation.load(model, store, config, worker.device) if worker.rank == 0 else None
    if not model.trainable:
        return _finish_untrained(config, worker, model, store, validation)
    resident = choose_resident(model, store, config, worker)
    config = config.replace(resident=resident)
    with stopping_together(worker):
        batches = make_batches(model, store, config, worker)
    trainer = Trainer(
        model, config.training, batches.steps_per_epoch * config.training.num_epochs, worker, config.compile
    )
    with stopping_together(worker):
        epoch = trainer.restore(config)
        tracker = Tracker(config, trainer.step, worker.echo) if worker.rank == 0 else None
    failed = True
    try:
        if tracker:
            tracker.console(describe(config, store, model, batches, worker, trainer.step))
        metrics = _run_epochs(config, worker, trainer, batches, validation, tracker, epoch)
        if not metrics and epoch == config.training.num_epochs:  # the run had ended already
            metrics = read_metrics(list_checkpoints(config.run_dir)[-1])
        if tracker:
            tracker.summarize(worker.on_trained(trainer.average.eval()))
        failed = False
        return metrics
    finally:
        if tracker:
            tracker.close(exit_code=int(failed))


def open_store(config: RunConfig) -> TransitionStore:
    """Open the dataset of a run.

    Raises:
        DataError: when it is missing, unfinished, or not the one the run was started on.
    """
    store = TransitionStore(config.dataset_path)
    if store.content_hash != config.dataset_hash:
        raise DataError(
            f"a run must continue on the rows it started with: {store.path} has hash {store.content_hash}, the run "
            f"{config.dataset_hash}; start a new run"
        )
    return store


def choose_resident(model: InverseDynamics, store: TransitionStore, config: RunConfig, worker: Worker) -> bool:
    """Return whether the train rows are kept in memory: where they fit on every worker, unless the config decides."""
    if config.resident is not None:
        return config.resident
    if found := list_checkpoints(config.run_dir):  # a continued run keeps its order, whatever is free now
        return bool(RunConfig.load(found[-1]).resident)
    fits = fits_in_memory(model, store.num_rows("train"), worker.device, worker.on_machine)
    # Resident and streamed batches have different orders: workers that disagreed would train on wrong shares.
    return float(worker.mean(torch.tensor(float(fits), device=worker.device))) == 1.0


def make_batches(model: InverseDynamics, store: TransitionStore, config: RunConfig, worker: Worker) -> Batches:
    """Return this worker's share of the train rows, resident or streamed as the config says."""
    share = Share(config.training.batch_size, worker.rank, worker.world_size)
    if config.resident:
        return ResidentBatches(load_rows(model, store, "train", worker.device), share, config.training.seed)
    return StreamingBatches(store, model, share, config.training.seed, worker.device)


def describe(
    config: RunConfig, store: TransitionStore, model: InverseDynamics, batches: Batches, worker: Worker, step: int
) -> str:
    """Return the line that opens a run's log."""
    parameters = sum(p.numel() for p in model.parameters())
    kind = "resident" if isinstance(batches, ResidentBatches) else "streamed"
    start = f", continuing from step {step:,}" if step else ""
    return (
        f"{config.model.name}: {parameters:,} parameters; {store.num_rows('train'):,} train rows ({kind}); "
        f"{config.training.num_epochs} epochs of {batches.steps_per_epoch:,} steps; {worker.world_size} worker(s) on "
        f"{worker.device}{start}"
    )


def _run_epochs(
    config: RunConfig,
    worker: Worker,
    trainer: Trainer,
    batches: Batches,
    validation: Validation | None,
    tracker: Tracker | None,
    first_epoch: int,
) -> Metrics:
    num_epochs = config.training.num_epochs
    clock = _Clock(trainer.step, trainer.total_steps)
    metrics: Metrics = {}
    for epoch in range(first_epoch, num_epochs):
        train_loss = _run_epoch(config, worker, trainer, batches, tracker, clock, epoch)
        done = epoch + 1
        save = _is_due(done, num_epochs, config.checkpoints)
        if not save and not _is_due(done, num_epochs, EVALUATIONS):
            continue
        with stopping_together(worker):
            if validation is not None and tracker is not None:
                metrics = {
                    "epoch": done,
                    "train_loss": train_loss,
                    **validation.evaluate(trainer.average),
                    "learning_rate": trainer.optimizer.param_groups[0]["lr"],
                    **clock.read(trainer.step),
                }
                tracker.log(metrics, trainer.step)
                tracker.console(_epoch_line(metrics, num_epochs, trainer.step, clock))
                if save:
                    weights = trainer.average.state_dict()
                    save_checkpoint(config.run_dir, config, trainer.step, weights, trainer.state(done), metrics)
                worker.on_metrics({"step": trainer.step, **metrics})
    return metrics


def _run_epoch(
    config: RunConfig,
    worker: Worker,
    trainer: Trainer,
    batches: Batches,
    tracker: Tracker | None,
    clock: _Clock,
    epoch: int,
) -> float:
    """Train one epoch and return its mean loss over steps and workers."""
    share = Share(config.training.batch_size, worker.rank, worker.world_size)
    generator = epoch_generator(config.training.seed, epoch, NOISE_STREAM, worker.device)
    losses = []
    for rows in batches.epoch(epoch):
        drawn = trainer.model.draw_noise(len(rows[0]) * share.batch_size, generator, worker.device)
        loss = worker.mean(trainer.train_chunk(rows, tuple(share.of(noise) for noise in drawn)).mean())
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise TrainingDiverged(
                f"training loss must stay finite: it is {losses[-1]} by step {trainer.step} (epoch {epoch + 1}); lower "
                f"learning_rate ({config.training.learning_rate:g}) or set training.max_grad_norm; checkpoints in "
                f"{config.run_dir} are from before"
            )
        if tracker and clock.console_is_due():
            tracker.console(
                f"  epoch {epoch + 1}/{config.training.num_epochs}  step {trainer.step:,}/{trainer.total_steps:,}  "
                f"train {losses[-1]:.4g}  {clock.rate(trainer.step):,.0f} steps/s  ETA {clock.eta(trainer.step)}"
            )
    return sum(losses) / len(losses)


def _finish_untrained(
    config: RunConfig, worker: Worker, model: InverseDynamics, store: TransitionStore, validation: Validation | None
) -> Metrics:
    """Fit a model that takes no gradient steps, and write its checkpoint."""
    if validation is None:
        return {}
    how = "no steps to train"
    if isinstance(model, FittedModel):
        rows = store.load_spread("train", model.max_fit_rows, columns=("state", "action", "next_state"))
        model.fit(*encode_rows(model, rows, worker.device))
        how += f", fitted to {len(rows['state']):,} train rows"
    metrics = {"epoch": 0, **validation.evaluate(model)}
    tracker = Tracker(config, echo=worker.echo)
    tracker.log(metrics, 0)
    tracker.console(f"{config.model.name}: {how}  {_losses(metrics)}")
    save_checkpoint(config.run_dir, config, 0, model.state_dict(), {"epoch": 0, "step": 0}, metrics)
    tracker.summarize(worker.on_trained(model.eval()))
    tracker.close()
    worker.on_metrics({"step": 0, **metrics})
    return metrics


class _Clock:
    """Rates and times of this process's part of a run."""

    def __init__(self, first_step: int, total_steps: int):
        self.first_step, self.total_steps = first_step, total_steps
        self.started = self.shown = time.perf_counter()

    def read(self, step: int) -> Metrics:
        return {"steps_per_s": self.rate(step), "elapsed_s": time.perf_counter() - self.started}

    def rate(self, step: int) -> float:
        return (step - self.first_step) / max(time.perf_counter() - self.started, 1e-9)

    def eta(self, step: int) -> str:
        seconds = (self.total_steps - step) / max(self.rate(step), 1e-9)
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

    def console_is_due(self) -> bool:
        due = time.perf_counter() - self.shown > CONSOLE_INTERVAL_S
        if due:
            self.shown = time.perf_counter()
        return due


def _is_due(done: int, total: int, times: int) -> bool:
    """Return whether something that happens `times` times over `total` epochs happens after epoch `done`."""
    return done == total or (done * times) // total > ((done - 1) * times) // total


def _epoch_line(metrics: Metrics, num_epochs: int, step: int, clock: _Clock) -> str:
    return (
        f"epoch {metrics['epoch']:.0f}/{num_epochs}  step {step:,}  {_losses(metrics)}  "
        f"{metrics['steps_per_s']:,.0f} steps/s  ETA {clock.eta(step)}"
    )


def _losses(metrics: Metrics) -> str:
    names = {"train_loss": "train", SELECTION_METRIC: "val", "val_nrmse": "val RMSE/std"}
    return "  ".join(f"{label} {metrics[name]:.4g}" for name, label in names.items() if name in metrics)
