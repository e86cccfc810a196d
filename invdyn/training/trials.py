"""The trials of a sweep: one network, or several of one shape at once, trained and evaluated in this process."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from invdyn.errors import InvdynError
from invdyn.evaluation.quality import quality_by_steps
from invdyn.models.base import InverseDynamics
from invdyn.training.attempt import Superseded
from invdyn.training.checkpoint import list_checkpoints
from invdyn.training.loop import train_loop
from invdyn.training.population import population_key, train_population
from invdyn.training.run_config import RunConfig, resolve_device
from invdyn.training.tracking import METRICS_CSV, read_rows
from invdyn.training.worker import Metrics, Worker
from invdyn.transitions.store import TransitionStore
from invdyn.url_path import AnyPath, as_path, write_whole

QUALITY_FILE = "quality.json"
STOPPED_FILE = "stopped_early"
ERROR_FILE = "error.txt"
QUALITY_ROWS = 2048
METRIC = "val_nrmse"

Report = Callable[[Metrics], None]


@dataclass(frozen=True)
class Trial:
    """One network of a sweep.

    Attributes:
        settings: key path to value, what sets it apart.
        run: the run that trains it.
    """

    settings: dict[str, Any]
    run: RunConfig


def group_trials(trials: Sequence[Trial], population: int) -> list[list[Trial]]:
    """Return which networks are trained at once: those of one shape, at most `population` together."""
    if population == 1:
        return [[trial] for trial in trials]
    alike: dict[str, list[Trial]] = {}
    for trial in trials:
        alike.setdefault(population_key(trial.run), []).append(trial)
    return [same[i : i + population] for same in alike.values() for i in range(0, len(same), population)]


def run_or_note(
    trials: Sequence[Trial], step_counts: tuple[int, ...] | None, on_metrics: Report, job: str = ""
) -> None:
    """Run trials; what the user can mend (a diverged loss, say) ends them, is noted, and costs no retries.

    What cannot be noted either is raised.

    Args:
        trials: one, or several to train at once.
        step_counts: at which each is evaluated.
        on_metrics: called with metrics as they come; may raise to stop the trials.
        job: names the command that they belong to.
    """
    try:
        if len(trials) == 1:
            run_trial(trials[0], step_counts, on_metrics, job)
        else:
            run_trials_at_once(trials, step_counts, on_metrics, job)
    except Superseded:
        raise  # the folders are another attempt's
    except InvdynError as error:
        for folder in [as_path(trial.run.run_dir) for trial in trials]:
            if not has_ended(folder) and not (folder / ERROR_FILE).exists():  # one that diverged keeps its own
                _note_error(folder, error)


def run_trial(trial: Trial, step_counts: tuple[int, ...] | None, on_metrics: Report, job: str = "") -> Metrics:
    """Train one network in this process and evaluate it at every step count.

    What an earlier, killed run of the trial reported is reported again first: early stopping then judges a resumed
    sweep as it would have judged an uninterrupted one.
    """
    run = trial.run
    folder = as_path(run.run_dir)
    reported = reported_metrics(folder)
    if has_ended(folder):
        for metrics in reported:
            on_metrics(metrics)
        return reported[-1]

    def pass_on(metrics: Metrics) -> None:
        # The scheduler may end a trial at any report: the last one waits until the network has been evaluated.
        if metrics["epoch"] < run.training.num_epochs:
            on_metrics(metrics)

    for metrics in reported:
        pass_on(metrics)
    run.save()
    (folder / ERROR_FILE).unlink(missing_ok=True)
    worker = Worker(
        resolve_device(run.device), on_metrics=pass_on, on_trained=_evaluation(trial, step_counts), echo=False, job=job
    )
    metrics = train_loop(run, worker)
    on_metrics(metrics)
    return metrics


def run_trials_at_once(
    trials: Sequence[Trial], step_counts: tuple[int, ...] | None, on_metrics: Report, job: str = ""
) -> None:
    """Train networks of one shape at once and evaluate each at every step count.

    Reported is the best of them after every epoch: early stopping ends all or none. A network that diverges is noted
    and ends alone; a continued sweep leaves it so, for without its checkpoints all would start again.
    """
    failed = [(as_path(trial.run.run_dir) / ERROR_FILE).exists() for trial in trials]
    live = list(trials) if all(failed) else [trial for trial, out in zip(trials, failed, strict=True) if not out]
    if len(live) == 1:
        run_trial(live[0], step_counts, on_metrics, job)
        return
    folders = [as_path(trial.run.run_dir) for trial in live]
    ended = all(has_ended(folder) for folder in folders)
    last_epoch = live[0].run.training.num_epochs
    for metrics in _common_rows([reported_metrics(folder) for folder in folders]):
        if ended or metrics["epoch"] < last_epoch:
            on_metrics(metrics)
    if ended:
        return
    for trial, folder in zip(live, folders, strict=True):
        trial.run.save()
        (folder / ERROR_FILE).unlink(missing_ok=True)
    device = resolve_device(live[0].run.device)
    evaluations = [_evaluation(trial, step_counts, len(live)) for trial in live]
    workers = [
        Worker(device, on_trained=evaluate, on_diverged=partial(_note_error, folder), echo=False, job=job)
        for evaluate, folder in zip(evaluations, folders, strict=True)
    ]

    def pass_on(rows: Sequence[Metrics]) -> None:
        if rows[0]["epoch"] < last_epoch:
            on_metrics(_best_of(rows))

    results = train_population([trial.run for trial in live], workers, on_epoch=pass_on)
    if rows := [result for result in results if not isinstance(result, InvdynError)]:
        on_metrics(_best_of(rows))


def _note_error(folder: AnyPath, error: InvdynError) -> None:
    try:
        write_whole(folder / ERROR_FILE, str(error))
    except OSError:
        raise error from None


def _evaluation(
    trial: Trial, step_counts: tuple[int, ...] | None, at_once: int = 1
) -> Callable[[InverseDynamics], Metrics]:
    """Return what evaluates the trained network and notes its quality; its share of the training time with it."""
    run = trial.run
    started = time.perf_counter()

    def evaluate(model: InverseDynamics) -> Metrics:
        train_s = (time.perf_counter() - started) / at_once
        counts = step_counts or (getattr(model, "num_inference_steps", 1),)
        quality = quality_by_steps(
            model, TransitionStore(run.dataset_path), counts, max_rows=min(run.val_rows, QUALITY_ROWS)
        )
        parameters = sum(p.numel() for p in model.parameters())
        facts = {"train_s": train_s, "parameters": parameters, "quality": [asdict(q) for q in quality]}
        write_whole(as_path(run.run_dir) / QUALITY_FILE, json.dumps(facts, indent=1))
        return {f"{METRIC}_at_{q.num_inference_steps}_steps": q.nrmse for q in quality}

    return evaluate


def best_first(error: float | None) -> tuple[bool, float]:
    """Return what to sort errors by: the lowest first, those that are missing or not finite last."""
    return (False, error) if error is not None and math.isfinite(error) else (True, 0.0)


def _best_of(rows: Sequence[Metrics]) -> Metrics:
    return min(rows, key=lambda row: best_first(row.get(METRIC)))


def _common_rows(reported: Sequence[list[Metrics]]) -> list[Metrics]:
    """Return the best row of every epoch that all networks have reported."""
    by_epoch = [{row["epoch"]: row for row in rows} for rows in reported]
    common = sorted(set.intersection(*(set(rows) for rows in by_epoch)))
    return [_best_of([rows[epoch] for rows in by_epoch]) for epoch in common]


def reported_metrics(folder: AnyPath) -> list[Metrics]:
    """Return the rows of metrics that a trial has reported and will not report again."""
    if not (lines := read_rows(folder / METRICS_CSV)):
        return []
    rows = [{name: float(value) for name, value in row.items() if value} for row in lines]
    if has_ended(folder):
        return rows
    found = list_checkpoints(folder)
    step = int(found[-1].name.rpartition("-")[2]) if found else 0
    return [row for row in rows if row["step"] <= step]


def has_ended(folder: AnyPath) -> bool:
    """Return whether a trial was evaluated or stopped early."""
    return (folder / QUALITY_FILE).exists() or (folder / STOPPED_FILE).exists()
