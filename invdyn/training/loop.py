"""The train loop that serves one process, DDP workers and sweep trials alike. It knows nothing of Ray."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from invdyn.errors import DataError, TrainingDiverged
from invdyn.models.base import InverseDynamics
from invdyn.models.fitted import FittedModel
from invdyn.models.flow import FlowInverseDynamics
from invdyn.training.attempt import Attempt, attempting
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
    list_checkpoints,
    read_metrics,
    save_checkpoint,
)
from invdyn.training.compiled import has_compiler
from invdyn.training.record import EVALUATIONS, Clock, Recorder, is_due, losses_text
from invdyn.training.run_config import RunConfig
from invdyn.training.sampling import settle_sampling
from invdyn.training.student import train_student
from invdyn.training.tracking import Tracker
from invdyn.training.trainer import Trainer
from invdyn.training.validation import Validation
from invdyn.training.watchdog import Watchdog
from invdyn.training.worker import Metrics, Worker, stopping_together
from invdyn.transitions.store import TransitionStore

NOISE_STREAM = 1
# Compiling takes 7 (an MLP) to 40 (a U-Net) seconds of CPU and saves about 1 ms a step: it must be sure to pay.
# On a GPU it takes 19 to 52 seconds and saves 1.6 to 5 ms.
COMPILE_PAYS_STEPS = {"cpu": 40_000, "cuda": 12_000}


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
    model = config.build_model()
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
    total_steps = batches.steps_per_epoch * config.training.num_epochs
    config = config.replace(compile=choose_compiled(config, worker, total_steps))
    trainer = make_trainer(model, config, worker, total_steps)
    with attempting(config.run_dir, worker) as attempt:
        return _train(config, worker, store, trainer, batches, validation, attempt)


def _train(
    config: RunConfig,
    worker: Worker,
    store: TransitionStore,
    trainer: Trainer,
    batches: Batches,
    validation: Validation | None,
    attempt: Attempt,
) -> Metrics:
    with stopping_together(worker):
        epoch = trainer.restore(config)
        tracker = Tracker(config, trainer.step, worker.echo, attempt=attempt) if worker.rank == 0 else None
    failed = True
    try:
        if tracker:
            tracker.console(describe(config, store, trainer.model, batches, worker, trainer.step))
        clock = Clock(trainer.step, trainer.total_steps)
        recorder = (
            Recorder(config, worker, trainer, validation, tracker, clock)
            if validation is not None and tracker is not None
            else None
        )
        with Watchdog(config.hang_timeout_s, attempt) as watchdog:
            metrics = _run_epochs(config, worker, trainer, batches, recorder, watchdog, epoch)
        if tracker:
            tracker.check()
        if not metrics and epoch == config.training.num_epochs:  # the run had ended already
            metrics = read_metrics(list_checkpoints(config.run_dir)[-1])
        if recorder is not None:
            settle_run(recorder, store)
        if tracker:
            tracker.summarize(worker.on_trained(trainer.average.eval()))
        failed = False
        return metrics
    finally:
        if tracker:
            tracker.close(exit_code=int(failed))


def settle_run(recorder: Recorder, store: TransitionStore) -> None:
    """Do what follows the last step: choose how a flow samples, and train its student if it is to have one."""
    config, trainer = recorder.config, recorder.trainer
    if (told := settle_sampling(config, trainer.average.eval(), store)) is not None:
        recorder.tracker.console(told)
    steps = config.training.student_steps
    if steps is not None:
        assert isinstance(trainer.average, FlowInverseDynamics)  # check_student
        recorder.tracker.console(f"training a student that samples in {steps} step(s)")
        folder = train_student(config, trainer.average, store, recorder.validation, trainer.total_steps)
        recorder.tracker.console(f"student: {folder}")


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


def choose_compiled(config: RunConfig, worker: Worker, total_steps: int) -> bool:
    """Return whether the step is compiled: of one worker's long run with a compiler, unless the config decides.

    Args:
        config: the run, or the first of a population.
        worker: this process.
        total_steps: of the run, or of all runs of a population together.
    """
    if config.compile is not None:
        return config.compile
    if found := list_checkpoints(config.run_dir):  # a continued run keeps its kind of step: others round otherwise
        return bool(RunConfig.load(found[-1]).compile)
    pays = total_steps >= COMPILE_PAYS_STEPS[worker.device.type]
    return worker.world_size == 1 and pays and has_compiler(worker.device)


def make_trainer(model: InverseDynamics, config: RunConfig, worker: Worker, total_steps: int) -> Trainer:
    """Return the trainer of a run whose `compile` is decided."""
    precision = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    return Trainer(model, config.training, total_steps, worker, bool(config.compile), precision)


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
    recorder: Recorder | None,
    watchdog: Watchdog,
    first_epoch: int,
) -> Metrics:
    num_epochs = config.training.num_epochs
    metrics: Metrics = {}
    for epoch in range(first_epoch, num_epochs):
        train_loss = _run_epoch(config, worker, trainer, batches, recorder, watchdog, epoch)
        done = epoch + 1
        save = is_due(done, num_epochs, config.checkpoints)
        if not save and not is_due(done, num_epochs, EVALUATIONS):
            continue
        with stopping_together(worker):
            if recorder is not None:
                metrics = recorder.record(done, train_loss, save=save)
    return metrics


def _run_epoch(
    config: RunConfig,
    worker: Worker,
    trainer: Trainer,
    batches: Batches,
    recorder: Recorder | None,
    watchdog: Watchdog,
    epoch: int,
) -> float:
    """Train one epoch and return its mean loss over steps and workers."""
    share = Share(config.training.batch_size, worker.rank, worker.world_size)
    generator = epoch_generator(config.training.seed, epoch, NOISE_STREAM, worker.device)
    losses: list[float] = []
    steps: list[int] = []
    queued: Tensor | None = None
    for rows in batches.epoch(epoch):
        steps.append(len(rows[0]))
        drawn = trainer.model.draw_noise(len(rows[0]) * share.batch_size, generator, worker.device)
        loss = worker.mean(trainer.train_chunk(rows, tuple(share.of(noise) for noise in drawn)).mean())
        # Reading a loss waits for the device: one chunk late, so that it has the next one to work on.
        if queued is not None:
            losses.append(_finite(float(queued), config, trainer.step, epoch))
        queued = loss
        watchdog.beat(trainer.step)
        if recorder and losses and recorder.clock.console_is_due():
            recorder.tracker.console(
                f"  epoch {epoch + 1}/{config.training.num_epochs}  step {trainer.step:,}/{trainer.total_steps:,}  "
                f"train {losses[-1]:.4g}  {recorder.clock.rate(trainer.step):,.0f} steps/s  "
                f"ETA {recorder.clock.eta(trainer.step)}"
            )
    assert queued is not None, "an epoch has at least one batch"
    losses.append(_finite(float(queued), config, trainer.step, epoch))
    return float(np.average(losses, weights=steps))


def _finite(loss: float, config: RunConfig, step: int, epoch: int) -> float:
    if not math.isfinite(loss):
        raise diverged(loss, config, step, epoch)
    return loss


def diverged(loss: float, config: RunConfig, step: int, epoch: int) -> TrainingDiverged:
    """Return the error of a run whose loss is no longer finite."""
    return TrainingDiverged(
        f"training loss must stay finite: it is {loss} by step {step} (epoch {epoch + 1}); lower "
        f"learning_rate ({config.training.learning_rate:g}) or set training.max_grad_norm; checkpoints in "
        f"{config.run_dir} are from before"
    )


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
    tracker.console(f"{config.model.name}: {how}  {losses_text(metrics)}")
    save_checkpoint(config.run_dir, config, 0, model.state_dict(), {"epoch": 0, "step": 0}, metrics)
    tracker.summarize(worker.on_trained(model.eval()))
    tracker.close()
    worker.on_metrics({"step": 0, **metrics})
    return metrics
