"""What a run validates, logs, shows and saves after an epoch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from invdyn.training.checkpoint import EPOCH, SELECTION_METRIC, STAGE, save_checkpoint
from invdyn.training.run_config import RunConfig
from invdyn.training.tracking import Tracker
from invdyn.training.trainer import Trainer
from invdyn.training.validation import Validation
from invdyn.training.worker import Metrics, Worker

EVALUATIONS = 20
CONSOLE_INTERVAL_S = 2.0


class Clock:
    """Rates and times of this process's part of a run."""

    def __init__(self, first_step: int, total_steps: int):
        self.first_step, self.total_steps = first_step, total_steps
        self.started = self.shown = time.perf_counter()

    def read(self, step: int) -> Metrics:
        """Return steps_per_s and elapsed_s."""
        return {"steps_per_s": self.rate(step), "elapsed_s": time.perf_counter() - self.started}

    def rate(self, step: int) -> float:
        """Return steps per second so far."""
        return (step - self.first_step) / max(time.perf_counter() - self.started, 1e-9)

    def eta(self, step: int) -> str:
        """Return the time left, in words."""
        seconds = (self.total_steps - step) / max(self.rate(step), 1e-9)
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

    def console_is_due(self) -> bool:
        """Return whether it is time for another line."""
        due = time.perf_counter() - self.shown > CONSOLE_INTERVAL_S
        if due:
            self.shown = time.perf_counter()
        return due


@dataclass
class Recorder:
    """Judges a model in training, and writes down what it finds.

    Attributes:
        config: the run.
        worker: told of every row of metrics.
        trainer: of the run.
        validation: what the model is judged by.
        tracker: where metrics go.
        clock: started with the training.
        metrics: the last row.
    """

    config: RunConfig
    worker: Worker
    trainer: Trainer
    validation: Validation
    tracker: Tracker
    clock: Clock
    metrics: Metrics = field(default_factory=dict)

    def record(self, done: int, train_loss: float, *, save: bool) -> Metrics:
        """Validate, log and show the model after `done` epochs, and write a checkpoint where it is due.

        Raises:
            DataError: when metrics or checkpoint cannot be written.
        """
        trainer = self.trainer
        self.metrics = metrics = {
            EPOCH: done,
            "train_loss": train_loss,
            **self.validation.evaluate(trainer.average),
            **({STAGE: trainer.average.stage} if trainer.average.num_stages > 1 else {}),
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            **self.clock.read(trainer.step),
        }
        self.tracker.log(metrics, trainer.step)
        self.tracker.console(
            f"epoch {done}/{self.config.training.num_epochs}  step {trainer.step:,}  {losses_text(metrics)}  "
            f"{metrics['steps_per_s']:,.0f} steps/s  ETA {self.clock.eta(trainer.step)}"
        )
        if save:
            weights = trainer.average.state_dict()
            save_checkpoint(self.config.run_dir, self.config, trainer.step, weights, trainer.state(done), metrics)
        self.worker.on_metrics({"step": trainer.step, **metrics})
        return metrics


def is_due(done: int, total: int, times: int) -> bool:
    """Return whether something that happens `times` times over `total` epochs happens after epoch `done`."""
    return done == total or (done * times) // total > ((done - 1) * times) // total


def losses_text(metrics: Metrics) -> str:
    """Return the losses of a row of metrics, in words."""
    names = {"train_loss": "train", SELECTION_METRIC: "val", "val_nrmse": "val RMSE/std"}
    return "  ".join(f"{label} {metrics[name]:.4g}" for name, label in names.items() if name in metrics)
