"""Several runs of one shape trained at once in one process: each as it would have been by itself, to rounding.

A small network leaves most of a machine idle, and most of its step is overhead. Here the weights of all runs are the
rows of one matrix, and their steps are one graph of batched products. Learning rate, schedule, weight decay, moving
average and seed (weights, order of the rows, noise) are each run's own, and so are its folder, metrics and checkpoints,
which are those of a run trained alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.errors import ConfigError, InvdynError, TrainingDiverged
from invdyn.models.base import InverseDynamics, Noise
from invdyn.training.attempt import attempting
from invdyn.training.batches import PopulationBatches, Rows, epoch_generator, fits_in_memory, load_rows
from invdyn.training.checkpoint import list_checkpoints, read_metrics
from invdyn.training.compiled import CompiledStep
from invdyn.training.loop import (
    NOISE_STREAM,
    choose_compiled,
    diverged,
    make_trainer,
    open_store,
    settle_run,
    train_loop,
)
from invdyn.training.record import EVALUATIONS, Clock, Recorder, is_due
from invdyn.training.run_config import RunConfig
from invdyn.training.tracking import Tracker
from invdyn.training.trainer import Trainer, split_chunk
from invdyn.training.validation import Validation
from invdyn.training.watchdog import Watchdog
from invdyn.training.worker import Metrics, Worker
from invdyn.transitions.store import TransitionStore

OWN_RECIPE = ("learning_rate", "schedule", "warmup_fraction", "weight_decay", "seed")
OWN_VALUES = ("run_dir", "tracking", "versions", "model", "training")


class PopulationTrainer:
    """Takes the steps of several trainers of one shape together.

    Args:
        trainers: restored already: their weights and optimizers move into one matrix.
        compiled: False to do without a compiler.
    """

    def __init__(self, trainers: Sequence[Trainer], compiled: bool):
        self.trainers, self.compiled = trainers, compiled
        self.step = self._make_step()

    def _make_step(self) -> CompiledStep:
        members = [trainer.member() for trainer in self.trainers]
        first = self.trainers[0]
        return CompiledStep(members, first.recipe.max_grad_norm, first.precision, self.compiled)

    def draw_noise(self, generators: Sequence[torch.Generator], steps: int, batch_size: int) -> Noise:
        """Return each run's own noise, as a run trained alone draws it: tensors of (steps, runs, batch, columns)."""
        model = self.trainers[0].model
        drawn = [model.draw_noise(steps * batch_size, generator, model.device) for generator in generators]
        return tuple(
            torch.stack([noise.unflatten(0, (steps, batch_size)) for noise in each], dim=1)
            for each in zip(*drawn, strict=True)
        )

    def train_chunk(self, rows: Rows, noise: Noise) -> Float[Tensor, "steps runs"]:
        """Take one step of every run per batch of a chunk.

        Args:
            rows: (context, target), each (steps, runs, batch, columns).
            noise: the same layout.

        Returns:
            The losses, on the device.
        """
        left = self.trainers[0].steps_left_in_stage()
        if left < len(rows[0]):
            return torch.cat([self.train_chunk(*part) for part in split_chunk(rows, noise, left)])
        started = [trainer.enter_stage() for trainer in self.trainers]
        if any(started):
            self.step = self._make_step()
        schedules = [trainer.schedule(len(rows[0])) for trainer in self.trainers]
        rates, decays = zip(*schedules, strict=True)
        losses = self.step(self.step.coefficients(np.stack(rates), np.stack(decays)), (*rows, *noise))
        for trainer, own in zip(self.trainers, rates, strict=True):
            trainer.advance(own)
        return losses


@dataclass
class _Run:
    """One run of a population.

    Attributes:
        recorder: of the run.
        error: what ended it.
    """

    recorder: Recorder
    error: InvdynError | None = None


def population_key(config: RunConfig) -> str:
    """Return what must be equal for runs to be trained at once: all but their names, seeds and rates."""
    values: dict[str, Any] = {key: value for key, value in config.to_values().items() if key not in OWN_VALUES}
    model = {key: value for key, value in config.model.to_values().items() if key not in ("name", "training")}
    recipe = config.training.model_dump(mode="json")
    recipe = {key: value for key, value in recipe.items() if key not in OWN_RECIPE}
    recipe["ema_decay"] = recipe["ema_decay"] is not None  # the decay itself is each run's own
    return json.dumps([values, model, recipe], sort_keys=True)


def train_population(
    configs: Sequence[RunConfig],
    workers: Sequence[Worker],
    on_epoch: Callable[[Sequence[Metrics]], None] = lambda rows: None,
) -> list[Metrics | InvdynError]:
    """Train runs at once, from their latest common checkpoint, or from the start, to the end of their recipe.

    A run whose loss diverges ends alone; the others go on.

    Args:
        configs: the runs, of one `population_key`.
        workers: one for each, all of this process and one device.
        on_epoch: called with the rows of metrics of all runs that go on, whenever they have been recorded; may raise.

    Returns:
        Of each run its last row of metrics as from `train_loop`, or the error that ended it.

    Raises:
        ConfigError: when the runs cannot be trained at once, or the rows do not fit the memory.
        DataError: as `train_loop`.
    """
    config, device = configs[0], workers[0].device
    _check(configs)
    store = open_store(config)
    if device.type == "cpu":
        torch.set_num_threads(config.cpu_threads)
    models = [_make_model(own, store, device) for own in configs]
    if len(configs) == 1 or not models[0].trainable:
        return [_train_alone(*each) for each in zip(configs, workers, strict=True)]
    batches = _load_batches(models[0], store, configs, device)
    total_steps = batches.steps_per_epoch * config.training.num_epochs
    trainers = [make_trainer(*each, total_steps) for each in zip(models, configs, workers, strict=True)]
    compiled = choose_compiled(config, workers[0], total_steps * len(configs))
    first_epoch = _restore(configs, trainers)
    validation = Validation.load(trainers[0].model, store, config, device)
    with ExitStack() as trackers:
        runs = []
        clock = Clock(trainers[0].step, total_steps)
        for own, worker, trainer in zip(configs, workers, trainers, strict=True):
            attempt = trackers.enter_context(attempting(own.run_dir, worker))
            tracker = Tracker(own, trainer.step, worker.echo, one_of_many=True, attempt=attempt)
            judge = replace(validation, seed=own.training.seed)
            own = own.replace(resident=True, compile=compiled)  # continued alone, it keeps its order and kind of step
            runs.append(_Run(Recorder(own, worker, trainer, judge, tracker, clock)))
            trackers.callback(_close, runs[-1])
        with Watchdog(config.hang_timeout_s, attempt) as watchdog:
            _train(runs, batches, compiled, first_epoch, on_epoch, watchdog)
        return [_finish(run, store) for run in runs]


def _train_alone(config: RunConfig, worker: Worker) -> Metrics | InvdynError:
    try:
        return train_loop(config, worker)
    except TrainingDiverged as error:
        worker.on_diverged(error)
        return error


def _check(configs: Sequence[RunConfig]) -> None:
    if len({population_key(config) for config in configs}) > 1:
        raise ConfigError(
            "runs that are trained at once must differ in their seeds, learning rates, schedules, weight decays and "
            "moving averages alone; train the others by themselves"
        )
    if len({config.run_dir for config in configs}) < len(configs):
        raise ConfigError("runs that are trained at once must have folders of their own; give each another run_dir")


def _make_model(config: RunConfig, store: TransitionStore, device: torch.device) -> InverseDynamics:
    torch.manual_seed(config.training.seed)
    model = config.build_model()
    model.fit_normalization(store.moments)
    return model.to(device)


def _load_batches(
    model: InverseDynamics, store: TransitionStore, configs: Sequence[RunConfig], device: torch.device
) -> PopulationBatches:
    if not fits_in_memory(model, store.num_rows("train"), device):
        raise ConfigError(
            f"runs that are trained at once keep the train rows in memory: {store.num_rows('train'):,} rows do not fit "
            f"half of what is free on {device}; train each by itself"
        )
    rows = load_rows(model, store, "train", device)
    return PopulationBatches(rows, configs[0].training.batch_size, [config.training.seed for config in configs])


def _restore(configs: Sequence[RunConfig], trainers: Sequence[Trainer]) -> int:
    """Load the latest checkpoint that all runs have: a kill may have come between those of an epoch."""
    found = [{folder.name: folder for folder in list_checkpoints(config.run_dir)} for config in configs]
    common = sorted(set.intersection(*(set(each) for each in found)))
    if not common:
        return 0
    epochs = [trainer.load(each[common[-1]]) for trainer, each in zip(trainers, found, strict=True)]
    return epochs[0]


def _train(
    runs: Sequence[_Run],
    batches: PopulationBatches,
    compiled: bool,
    first_epoch: int,
    on_epoch: Callable[[Sequence[Metrics]], None],
    watchdog: Watchdog,
) -> None:
    config = runs[0].recorder.config
    num_epochs = config.training.num_epochs
    trainer = PopulationTrainer([run.recorder.trainer for run in runs], compiled)
    for epoch in range(first_epoch, num_epochs):
        losses = _train_epoch(trainer, runs, batches, epoch, watchdog)
        if all(run.error for run in runs):
            return
        done = epoch + 1
        save = is_due(done, num_epochs, config.checkpoints)
        if save or is_due(done, num_epochs, EVALUATIONS):
            going_on = [(run.recorder, loss) for run, loss in zip(runs, losses, strict=True) if run.error is None]
            on_epoch([recorder.record(done, loss, save=save) for recorder, loss in going_on])


def _train_epoch(
    trainer: PopulationTrainer, runs: Sequence[_Run], batches: PopulationBatches, epoch: int, watchdog: Watchdog
) -> list[float]:
    """Train one epoch and return each run's mean loss; a run whose loss is not finite gets its error."""
    device = runs[0].recorder.worker.device
    generators = [epoch_generator(seed, epoch, NOISE_STREAM, device) for seed in batches.seeds]
    losses, steps = [], []
    for rows in batches.epoch(epoch):
        steps.append(len(rows[0]))
        noise = trainer.draw_noise(generators, len(rows[0]), batches.batch_size)
        losses.append(trainer.train_chunk(rows, noise).mean(dim=0))
        watchdog.beat(runs[0].recorder.trainer.step)
    means: list[float] = np.average(torch.stack(losses).cpu(), axis=0, weights=steps).tolist()
    for run, loss in zip(runs, means, strict=True):
        if run.error is None and not math.isfinite(loss):
            run.error = diverged(loss, run.recorder.config, run.recorder.trainer.step, epoch)
            run.recorder.tracker.console(str(run.error))
            run.recorder.worker.on_diverged(run.error)
    return means


def _finish(run: _Run, store: TransitionStore) -> Metrics | InvdynError:
    if run.error is not None:
        return run.error
    recorder = run.recorder
    metrics = recorder.metrics or read_metrics(list_checkpoints(recorder.config.run_dir)[-1])
    model = recorder.trainer.average.eval()
    settle_run(recorder, store)
    recorder.tracker.summarize(recorder.worker.on_trained(model))
    run.recorder.metrics = metrics
    return metrics


def _close(run: _Run) -> None:
    run.recorder.tracker.close(exit_code=int(run.error is not None or not run.recorder.metrics))
