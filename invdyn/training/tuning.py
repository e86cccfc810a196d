"""Ray Tune: one trial per network, or per population of them, each in the trial's own process; and their results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import yaml

from invdyn import storage
from invdyn.arrow_storage import for_ray
from invdyn.errors import ConfigError, DataError
from invdyn.evaluation.quality import StepQuality
from invdyn.nodes import SharedFiles, shared_files, watching_nodes
from invdyn.training.checkpoint import BEST, WEIGHTS_FILE, choose_steps, list_checkpoints
from invdyn.training.distributed import cluster_resources
from invdyn.training.run_config import CONFIG_FILE, RunConfig, resolve_device
from invdyn.training.sweep_config import SWEEP_FILE, SweepConfig
from invdyn.training.tracking import to_csv
from invdyn.training.trials import (
    ERROR_FILE,
    METRIC,
    QUALITY_FILE,
    STOPPED_FILE,
    Trial,
    best_first,
    group_trials,
    has_ended,
    reported_metrics,
    run_or_note,
)
from invdyn.transitions.store import MANIFEST
from invdyn.url_path import AnyPath, as_path, remove_tree, replacing_folder, write_whole

RESULTS_CSV = "results.csv"
TRIALS = "trials"
TUNE = "tune"
MAX_FAILURES = 2
FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"


@dataclass(frozen=True)
class SweepRow:
    """One line of `results.csv`: a network at a number of steps; of a trial that was stopped, its last validation.

    Attributes:
        trial: name of the trial.
        status: finished, stopped early, or failed.
        settings: key path to value.
        num_inference_steps: solver steps.
        val_nrmse: RMSE / std(action) of one sample on the validation split.
        energy_score: of eight samples, in std(action); None for a trial that was stopped.
        us_per_action: wall time at batch 1,000, in microseconds; None likewise.
        epochs: trained.
        train_s: seconds in the train loop.
        parameters: of the network.
        run_dir: the trial's run.
    """

    trial: str
    status: str
    settings: dict[str, Any]
    num_inference_steps: int | None
    val_nrmse: float | None
    energy_score: float | None
    us_per_action: float | None
    epochs: int
    train_s: float
    parameters: int
    run_dir: str


def run_sweep(
    sweep: SweepConfig,
    trials: list[Trial],
    folder: AnyPath,
    *,
    local: bool = False,
    max_concurrent: int | None = None,
    on_trial: Callable[[], None] = lambda: None,
    on_fault: Callable[[str], None] = lambda line: None,
) -> list[SweepRow]:
    """Train and evaluate all trials; write `results.csv` and copy the best checkpoint to `best/`.

    What a killed sweep left in the folder is continued: ended trials keep their results, others go on from their latest
    checkpoints.

    Args:
        sweep: the space and how to search it.
        trials: its networks.
        folder: of the sweep, absolute; every node must reach it and the dataset.
        local: one trial after another in this process, without early stopping.
        max_concurrent: trials at a time, in place of the config's.
        on_trial: called whenever a trial has ended.
        on_fault: called with a line that says what happened to a trial, a node or an earlier command, and what is done.

    Returns:
        The rows of `results.csv`, best first.

    Raises:
        ConfigError: when this machine or the cluster has not what a trial asks for, or a node does not reach the
            sweep's files.
        DataError: when no trial has finished.
    """
    devices = {trial.run.device for trial in trials}
    if local:
        for device in devices:
            resolve_device(device)
    groups = group_trials(trials, sweep.population)
    folders = [as_path(trial.run.run_dir) for trial in trials]
    ended = sum(has_ended(folder) for folder in folders)
    if begun := sum(bool(list_checkpoints(folder)) for folder in folders if not has_ended(folder)):
        on_fault(f"command was cut off: {ended} trials are kept, {begun} go on from their latest checkpoints")
    if local:
        _run_local(sweep, groups, on_trial)
    else:
        resources = trial_resources(sweep, devices)
        manifests = sorted({storage.join(trial.run.dataset_path, MANIFEST) for trial in trials})
        needs = {name.upper(): amount for name, amount in resources.items()}
        lost = "its trials go on from their latest checkpoints"
        with shared_files(str(folder), manifests, needs) as files, watching_nodes(on_fault, lost):
            callback = _callback(groups, on_trial, on_fault)
            _run_on_ray(sweep, groups, files, resources, max_concurrent or sweep.max_concurrent_trials, callback)
    rows = collect_rows(trials)
    write_results(folder / RESULTS_CSV, rows)
    finished = [row for row in rows if row.status == FINISHED]
    if not finished:
        raise DataError(
            f"at least one trial must finish, none of {len(trials)} has; {_first_error(trials)}"
            f"see {folder / RESULTS_CSV} and each trial in {folder / TRIALS}"
        )
    copy_best(finished[0], folder / BEST)
    return rows


def trial_resources(sweep: SweepConfig, devices: Iterable[str]) -> dict[str, float]:
    """Return what a trial reserves ("cpu", and "gpu" where it uses one) on the cluster that Ray is connected to.

    Raises:
        ConfigError: when a trial asks for a GPU and the cluster has none.
    """
    wanted, gpus = set(devices), int(cluster_resources().get("GPU", 0))
    if gpus == 0 and any(device.startswith("cuda") for device in wanted):
        raise ConfigError("--device cuda needs a GPU: the cluster has none; use --device cpu or auto")
    resources = {"cpu": float(sweep.cpus_per_trial)}
    if gpus > 0 and wanted != {"cpu"}:
        resources["gpu"] = sweep.gpus_per_trial
    return resources


def collect_rows(trials: list[Trial]) -> list[SweepRow]:
    """Read what the trials left on disk; finished ones first, the best of them first."""
    rows = [row for trial in trials for row in _rows_of(trial)]
    return sorted(rows, key=lambda row: (row.status != FINISHED, best_first(row.val_nrmse), row.num_inference_steps))


def write_results(path: AnyPath, rows: list[SweepRow]) -> None:
    """Write the rows as CSV, one column per setting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        values = asdict(row)
        settings = {key: json.dumps(value) for key, value in values.pop("settings").items()}
        lines.append({"trial": values.pop("trial"), "status": values.pop("status"), **settings, **values})
    columns = dict.fromkeys(name for line in lines for name in line)
    write_whole(path, to_csv(list(columns) or ["trial"], lines))


def copy_best(row: SweepRow, folder: AnyPath) -> None:
    """Copy the final checkpoint of a trial to `folder`, its config set to the row's number of steps."""
    source = list_checkpoints(row.run_dir)[-1]
    with replacing_folder(folder, last=WEIGHTS_FILE) as temporary:
        for file in source.iterdir():
            (temporary / file.name).write_bytes(file.read_bytes())
        config = RunConfig.load(source)
        if row.num_inference_steps is not None and hasattr(config.model, "num_inference_steps"):
            config = config.replace(model=config.model.replace(num_inference_steps=row.num_inference_steps))
            choose_steps(temporary, row.num_inference_steps)
        (temporary / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")


def save_sweep(folder: AnyPath, sweep: SweepConfig) -> None:
    """Write the resolved sweep config into its folder.

    Raises:
        ConfigError: when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(sweep.model_dump(mode="json", by_alias=True), sort_keys=False)
        write_whole(folder / SWEEP_FILE, text)
    except OSError as error:
        raise ConfigError(f"sweep folder cannot be written: {folder}: {error}") from None


def _run_local(sweep: SweepConfig, groups: list[list[Trial]], on_trial: Callable[[], None]) -> None:
    for group in groups:
        if not all((as_path(trial.run.run_dir) / QUALITY_FILE).exists() for trial in group):
            # Nobody would restart them.
            patient = [replace(trial, run=trial.run.replace(hang_timeout_s=0)) for trial in group]
            run_or_note(patient, sweep.step_counts, lambda metrics: None)
        for _ in group:
            on_trial()


def _run_on_ray(
    sweep: SweepConfig,
    groups: list[list[Trial]],
    files: SharedFiles,
    resources: dict[str, float],
    max_concurrent: int | None,
    callback: Any,
) -> None:
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler

    # Tune's own handler would end `fit` as if the sweep were complete.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    trials = [trial for group in groups for trial in group]

    def trainable(chosen: dict[str, int]) -> None:
        # Indices, not configs, go through Tune: its own files stay readable and free of our classes.
        torch.set_num_threads(sweep.cpus_per_trial)
        files.check_here()
        run_or_note(groups[chosen["group"]], sweep.step_counts, tune.report, files.token)

    num_epochs = max(trial.run.training.num_epochs for trial in trials)
    scheduler = None
    if sweep.asha is not None and num_epochs > 1:
        scheduler = AsyncHyperBandScheduler(
            time_attr="epoch",
            max_t=num_epochs,
            grace_period=max(1, round(sweep.asha.grace_share * num_epochs)),
            reduction_factor=sweep.asha.reduction_factor,
        )
    with_resources = tune.with_resources(trainable, resources)
    # Tune's own state is pickled; ours, a folder per trial, is enough to continue from.
    remove_tree(as_path(files.folder) / TUNE)
    path, filesystem = for_ray(files.folder)
    tune.Tuner(
        with_resources,
        param_space={"group": tune.grid_search(list(range(len(groups))))},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            scheduler=scheduler,
            max_concurrent_trials=max_concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
        ),
    ).fit()


def _callback(groups: list[list[Trial]], on_trial: Callable[[], None], on_fault: Callable[[str], None]) -> Any:
    from ray import tune

    class Report(tune.Callback):  # type: ignore[misc]
        """Note which trials were stopped early, and tell the command when one has ended or its worker is lost."""

        def on_trial_recover(self, *_: Any, trial: Any, **__: Any) -> None:
            names = ", ".join(as_path(each.run.run_dir).name for each in groups[trial.config["group"]])
            on_fault(f"worker lost with trial {names}: it goes on from its latest checkpoint")

        def on_trial_complete(self, *_: Any, trial: Any, **__: Any) -> None:
            for each in groups[trial.config["group"]]:
                folder = as_path(each.run.run_dir)
                if not any((folder / name).exists() for name in (QUALITY_FILE, ERROR_FILE)):
                    write_whole(folder / STOPPED_FILE, "")
                on_trial()

        def on_trial_error(self, *_: Any, trial: Any, **__: Any) -> None:
            for _each in groups[trial.config["group"]]:
                on_trial()

    return Report()


def _first_error(trials: list[Trial]) -> str:
    for trial in trials:
        path = as_path(trial.run.run_dir) / ERROR_FILE
        if path.exists():
            return f"{as_path(trial.run.run_dir).name}: {path.read_text(encoding='utf-8')}; "
    return ""


def _rows_of(trial: Trial) -> list[SweepRow]:
    folder = as_path(trial.run.run_dir)
    reported = reported_metrics(folder)
    last = reported[-1] if reported else {}
    common: dict[str, Any] = {
        "trial": folder.name,
        "settings": trial.settings,
        "epochs": int(last.get("epoch", 0)),
        "run_dir": str(folder),
    }
    if (folder / QUALITY_FILE).exists():
        facts = json.loads((folder / QUALITY_FILE).read_text(encoding="utf-8"))
        return [
            SweepRow(
                status=FINISHED,
                num_inference_steps=quality.num_inference_steps,
                val_nrmse=quality.nrmse,
                energy_score=quality.energy_score,
                us_per_action=quality.us_per_action,
                train_s=facts["train_s"],
                parameters=facts["parameters"],
                **common,
            )
            for quality in (StepQuality(**values) for values in facts["quality"])
        ]
    return [
        SweepRow(
            status=STOPPED if (folder / STOPPED_FILE).exists() else FAILED,
            num_inference_steps=getattr(trial.run.model, "num_inference_steps", None),
            val_nrmse=last.get(METRIC),
            energy_score=None,
            us_per_action=None,
            train_s=last.get("elapsed_s", 0.0),
            parameters=0,
            **common,
        )
    ]
