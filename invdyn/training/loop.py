"""The train loop that serves one process, DDP workers and sweep trials alike. It knows nothing of Ray."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdyn.errors import DataError, InvdynError, TrainingDiverged
from invdyn.models.base import InverseDynamics, Noise
from invdyn.models.recipe import TrainingRecipe
from invdyn.models.registry import build_model
from invdyn.training.batches import (
    Batches,
    ResidentBatches,
    Rows,
    Share,
    StreamingBatches,
    epoch_generator,
    fits_in_memory,
    load_rows,
)
from invdyn.training.checkpoint import (
    SELECTION_METRIC,
    list_checkpoints,
    load_trainer_state,
    read_metrics,
    save_checkpoint,
)
from invdyn.training.compiled import CompiledStep
from invdyn.training.run_config import RunConfig
from invdyn.training.tracking import Tracker
from invdyn.training.validation import Validation
from invdyn.transitions.store import TransitionStore

EVALUATIONS = 20
CONSOLE_INTERVAL_S = 2.0
NOISE_STREAM = 1

Metrics = dict[str, float]


def raise_own(error: InvdynError | None) -> None:
    """Raise the error of the only worker, if it has one."""
    if error is not None:
        raise error


@dataclass(frozen=True)
class Worker:
    """The place of this process among those that train together.

    Attributes:
        device: where it trains.
        rank: its number; rank 0 tracks and writes checkpoints.
        world_size: how many there are.
        on_machine: how many of them share this machine's memory.
        wrap: makes a module average its gradients over the workers.
        mean: averages a scalar tensor over the workers.
        agree: called by all workers at the same points, with the error of this one; raises the first error on all.
        on_metrics: called on rank 0 with each row of metrics; may raise to stop the run.
        on_trained: called on rank 0 with the finished model; what it returns goes to the run's W&B summary.
        echo: print console lines.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    on_machine: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    mean: Callable[[Tensor], Tensor] = lambda value: value
    agree: Callable[[InvdynError | None], None] = raise_own
    on_metrics: Callable[[Metrics], None] = lambda metrics: None
    on_trained: Callable[[InverseDynamics], Metrics] = lambda model: {}
    echo: bool = True


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
        return _finish_untrained(config, worker, model, validation)
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


@contextmanager
def stopping_together(worker: Worker) -> Iterator[None]:
    """Pass an error of one worker on to all: none may wait in the next all-reduce for one that has left."""
    own: InvdynError | None = None
    try:
        yield
    except InvdynError as error:
        own = error
    worker.agree(own)


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    context: Float[Tensor, "batch context"],
    target: Float[Tensor, "batch target"],
    noise: Noise,
    max_grad_norm: float | None = None,
) -> Float[Tensor, ""]:
    """Take one optimizer step and return its loss, still on the device."""
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = module(context, target, *noise)
    loss.backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm, foreach=True)
    optimizer.step()
    return loss.detach()


def learning_rate_at(recipe: TrainingRecipe, step: int, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or half a cosine to zero."""
    warmup = max(1, round(recipe.warmup_fraction * total_steps)) if recipe.warmup_fraction else 0
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


class Trainer:
    """A model with its optimizer, schedule and moving average.

    Args:
        model: on the worker's device.
        recipe: how to train it.
        total_steps: length of the schedule.
        worker: this process.
        compiled: compile forward and backward.
    """

    def __init__(
        self, model: InverseDynamics, recipe: TrainingRecipe, total_steps: int, worker: Worker, compiled: bool = False
    ):
        self.model, self.recipe, self.total_steps, self.worker = model, recipe, total_steps, worker
        self.module = worker.wrap(torch.compile(model) if compiled else model)  # type: ignore[arg-type]
        self.parameters: list[Tensor] = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.average = copy.deepcopy(model).requires_grad_(False) if recipe.ema_decay is not None else model
        self.average_parameters: list[Tensor] = list(self.average.parameters())
        self.compiled = compiled
        self.one_graph: CompiledStep | None = None
        self.step = 0

    def train_chunk(self, rows: Rows, noise: Noise) -> Float[Tensor, "steps"]:
        """Take one step per batch of a chunk.

        Args:
            rows: (context, target), each (steps, local batch, columns).
            noise: the same layout.

        Returns:
            The loss of each step, on the device.
        """
        if self.compiled and self.worker.world_size == 1:
            return self._train_chunk_compiled(rows, noise)
        losses = []
        for context, target, *batch_noise in zip(*rows, *noise, strict=True):
            self.optimizer.param_groups[0]["lr"] = learning_rate_at(self.recipe, self.step, self.total_steps)
            losses.append(
                train_step(self.module, self.optimizer, context, target, tuple(batch_noise), self.recipe.max_grad_norm)
            )
            self._update_average()
            self.step += 1
        return torch.stack(losses)

    def _train_chunk_compiled(self, rows: Rows, noise: Noise) -> Float[Tensor, "steps"]:
        if self.one_graph is None:  # not before `restore`: it takes over the memory of weights and optimizer
            average = self.average_parameters if self.average is not self.model else []
            self.one_graph = CompiledStep(self.model, self.optimizer, average, self.recipe.max_grad_norm)
        steps = range(self.step, self.step + len(rows[0]))
        rates = [learning_rate_at(self.recipe, step, self.total_steps) for step in steps]
        coefficients = self.one_graph.coefficients(rates, [self._decay_at(step) for step in steps])
        losses = [
            self.one_graph(now, context, target, tuple(batch_noise))
            for now, context, target, *batch_noise in zip(coefficients, *rows, *noise, strict=True)
        ]
        self.optimizer.param_groups[0]["lr"] = rates[-1]
        self.one_graph.advance(len(losses))
        self.step += len(losses)
        return torch.stack(losses)

    def state(self, epoch: int) -> dict[str, Any]:
        """Return what `restore` needs: tensors and plain values."""
        return {
            "epoch": epoch,
            "step": self.step,
            "weights": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, config: RunConfig) -> int:
        """Continue from the run's latest checkpoint, if there is one, and return the epoch to start with.

        Raises:
            DataError: when the checkpoint cannot be read, or belongs to another model.
        """
        found = list_checkpoints(config.run_dir)
        if not found:
            return 0
        state = load_trainer_state(found[-1], self.worker.device)
        try:
            self.model.load_state_dict(state["weights"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, epoch = int(state["step"]), int(state["epoch"])
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"trainer state does not fit the run: {found[-1]}: {reason}; start a new run") from None
        return epoch

    def _update_average(self) -> None:
        if self.recipe.ema_decay is not None:
            torch._foreach_lerp_(self.average_parameters, self.parameters, 1.0 - self._decay_at(self.step))

    def _decay_at(self, step: int) -> float:
        """Return the decay of the moving average: its first steps must forget the random start quickly."""
        return min(self.recipe.ema_decay or 0.0, (1 + step) / (10 + step))


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
    config: RunConfig, worker: Worker, model: InverseDynamics, validation: Validation | None
) -> Metrics:
    """Write the checkpoint of a model that its statistics determine."""
    if validation is None:
        return {}
    metrics = {"epoch": 0, **validation.evaluate(model)}
    tracker = Tracker(config, echo=worker.echo)
    tracker.log(metrics, 0)
    tracker.console(f"{config.model.name}: nothing to train, fitted from the dataset's statistics  {_losses(metrics)}")
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
