"""Sweep networks and step counts with Ray Tune, and keep the best model.

python experiments/sweep.py                                   # the default sweep, on this machine
python experiments/sweep.py --config my_sweep.yaml --address auto
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from collect import collect_section, record
from common import (
    EXIT_INTERRUPTED,
    ROOT,
    add_common_arguments,
    add_hang_timeout,
    connect,
    load_dataset_config,
    run_command,
)

from invdyn import storage
from invdyn.errors import ConfigError, DataError
from invdyn.evaluation.plots import plot_quality_against_cost
from invdyn.models.registry import ModelConfig, load_model_config
from invdyn.progress import Progress
from invdyn.training.checkpoint import BEST
from invdyn.training.run_config import HANG_TIMEOUT_S, RunConfig, TrackingConfig, resolve_device
from invdyn.training.student import check_student
from invdyn.training.sweep_config import (
    EPOCHS_KEY,
    STEPS_KEY,
    SWEEP_FILE,
    SweepConfig,
    load_sweep_config,
    model_of_trial,
    trial_name,
)
from invdyn.training.trials import Trial
from invdyn.training.tuning import (
    FINISHED,
    RESULTS_CSV,
    TRIALS,
    SweepRow,
    run_sweep,
    save_sweep,
    trial_resources,
)
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset
from invdyn.transitions.store import MANIFEST, TransitionStore
from invdyn.url_path import AnyPath, as_path

DEFAULT_CONFIG = ROOT / "configs" / "sweep" / "pendulum.yaml"
QUALITY_PNG = "quality_against_cost.png"
SMOKE_TRIALS, SMOKE_EPOCHS = 2, 2
SHOWN_ROWS = 10


def main() -> None:
    """Run a sweep, and print its best rows and where they are."""
    args = parse_arguments()
    if args.local and (args.num_workers or 1) > 1:
        raise ConfigError(f"--local trains in one process, got --num_workers {args.num_workers}; drop one of them")
    folder, sweep, dataset = open_sweep(args)
    networks = make_networks(sweep, args.device)
    devices = [model.device or "auto" for _, model in networks]
    if args.local:
        here = " and ".join(sorted({str(resolve_device(device)) for device in devices}))
    else:
        connect(args, lambda _: plan_trials(sweep, devices, args.num_workers))
    store = open_dataset(dataset, args)
    trials = make_trials(sweep, networks, store, folder, args)
    if args.local:
        # Nothing is started: it is said when all that can be checked is.
        connect(args, device=here)
    save_sweep(folder, sweep)
    print(f"{len(trials)} networks x {len(sweep.step_counts or (1,))} step counts on {store}", flush=True)
    try:
        with Progress(len(trials), f"sweep {sweep.name}", "trials") as progress:
            rows = run_sweep(
                sweep,
                trials,
                folder,
                local=args.local,
                max_concurrent=args.num_workers,
                on_trial=lambda: progress.update(1),
                on_fault=progress.say,
            )
    except KeyboardInterrupt:
        print(f"interrupted; continue with --resume {folder}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    plot_quality_against_cost(curves(rows), folder / QUALITY_PNG)
    print(table(rows))
    print(f"results: {folder / RESULTS_CSV}\nbest model: {folder / BEST}\nplot: {folder / QUALITY_PNG}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="YAML", help="sweep config (default: configs/sweep/pendulum.yaml)")
    parser.add_argument("--device", help="auto, cpu or cuda (default: the model config's, else auto)")
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder or URL of the sweep (default: runs/sweeps/NAME-TIME)"
    )
    parser.add_argument("--resume", metavar="FOLDER", help="continue a sweep that was killed")
    add_hang_timeout(parser)
    add_common_arguments(parser)
    return parser.parse_args()


def open_sweep(args: argparse.Namespace) -> tuple[AnyPath, SweepConfig, DatasetConfig]:
    """Return the folder, the config and the dataset's config of a new or a resumed sweep.

    Raises:
        ConfigError: for a flag that would change a resumed sweep, or a folder that exists.
    """
    if args.resume:
        if args.config or args.output or args.storage or args.overrides or args.smoke:
            raise ConfigError(
                "--resume continues a sweep as it was started; drop --config, --output, --storage, --set, --smoke"
            )
        folder = as_path(storage.absolute(args.resume))
        sweep = load_sweep_config(folder / SWEEP_FILE, [])
        return folder, sweep, load_dataset_config(find(sweep.dataset_config), sweep.storage)
    sweep = load_sweep_config(args.config or DEFAULT_CONFIG, args.overrides)
    if args.storage:
        sweep = sweep.replace(storage=args.storage)
    if args.smoke:
        sweep = shortened(sweep)
    dataset = load_dataset_config(find(sweep.dataset_config), sweep.storage)
    default = dataset.below_storage(f"runs/sweeps/{sweep.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = as_path(storage.absolute(args.output or default))
    if folder.exists() and (not folder.is_dir() or any(True for _ in folder.iterdir())):
        raise ConfigError(f"sweep folder exists already: {folder}; continue it with --resume or give another --output")
    return folder, sweep, dataset


def shortened(sweep: SweepConfig) -> SweepConfig:
    """Return the sweep with few networks and epochs, whatever epochs its space holds."""
    space = {key: values for key, values in sweep.space.items() if key != EPOCHS_KEY}
    epochs = {"space": space, "num_epochs": SMOKE_EPOCHS} if space else {"space": {EPOCHS_KEY: [SMOKE_EPOCHS]}}
    return sweep.replace(num_trials=SMOKE_TRIALS, **epochs)


def plan_trials(sweep: SweepConfig, devices: list[str], num_workers: int | None) -> str:
    """Return what the sweep will use of the cluster.

    Raises:
        ConfigError: when it asks for GPUs that the cluster has not.
    """
    share = " and ".join(f"{amount:g} {name.upper()}" for name, amount in trial_resources(sweep, devices).items())
    limit = num_workers or sweep.max_concurrent_trials
    return f"{share} per trial, {f'at most {limit}' if limit else 'as many as fit'} at a time"


def find(path: str) -> Path:
    """Return a config named in a sweep: relative to the working directory, else to this project."""
    return Path(path) if Path(path).exists() or not (ROOT / path).exists() else ROOT / path


def open_dataset(config: DatasetConfig, args: argparse.Namespace) -> TransitionStore:
    """Return the dataset, made first where it is missing and the config says how to record it.

    Raises:
        DataError: when it is missing and cannot be made, or has no validation rows.
    """
    path = config.transitions_path
    if storage.exists(storage.join(path, MANIFEST)) or config.collect is None:
        store = TransitionStore(path)
    else:
        print(f"the dataset is not there yet, making it first: {path}", flush=True)
        record(config, collect_section(config, args), local=args.local, num_workers=args.num_workers)
        store = create_dataset(config, local=args.local, num_workers=args.num_workers)
    if not store.num_rows("val"):
        raise DataError(f"a sweep needs validation rows to compare networks by: {path} has none; set val_ratio above 0")
    return store


def make_networks(sweep: SweepConfig, device: str | None) -> list[tuple[dict[str, Any], ModelConfig]]:
    """Return settings and model config of each network to train, all validated.

    Raises:
        ConfigError: when a key or value of the space is not the model's.
    """
    base = load_model_config(find(sweep.model_config_file), [f"device={device}"] if device else [])
    if sweep.step_counts:
        model_of_trial(base, {STEPS_KEY: sweep.step_counts[0]})
    return [(settings, model_of_trial(base, settings)) for settings in sweep.network_settings()]


def make_trials(
    sweep: SweepConfig,
    networks: list[tuple[dict[str, Any], ModelConfig]],
    store: TransitionStore,
    folder: AnyPath,
    args: argparse.Namespace,
) -> list[Trial]:
    """Return the runs that train the networks.

    Raises:
        ConfigError: when one of them cannot train its student.
    """
    trials = []
    for index, (settings, model) in enumerate(networks):
        name = trial_name(index, settings)
        run = RunConfig.for_dataset(
            store,
            folder / TRIALS / name,
            model=model,
            training=model.training.replace(**({"num_epochs": sweep.num_epochs} if sweep.num_epochs else {})),
            device=model.device or "auto",
            hang_timeout_s=HANG_TIMEOUT_S if args.hang_timeout_s is None else args.hang_timeout_s,
            cpu_threads=sweep.cpus_per_trial,
            checkpoints=2,
            tracking=TrackingConfig(mode=args.wandb, group=folder.name, name=name),
        )
        check_student(run)
        trials.append(Trial(settings, run))
    return trials


def curves(rows: list[SweepRow]) -> dict[str, np.ndarray]:
    """Return (microseconds per action, error, steps) per finished network, best network first."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if row.status == FINISHED and row.us_per_action and row.val_nrmse is not None:
            points = found.setdefault(label(row), [])
            points.append((row.us_per_action, row.val_nrmse, float(row.num_inference_steps or 1)))
    return {name: np.array(sorted(points, key=lambda point: point[2])) for name, points in found.items()}


def label(row: SweepRow) -> str:
    """Return a network's settings in words."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.settings.items())


def table(rows: list[SweepRow]) -> str:
    """Return the best rows as text."""
    lines = [f"{'RMSE/std':>9} {'energy':>9} {'us/action':>9} {'steps':>5} {'epochs':>6}  network"]
    for row in rows[:SHOWN_ROWS]:
        error, energy, cost = (
            f"{v:9.4g}" if v is not None else f"{'-':>9}" for v in (row.val_nrmse, row.energy_score, row.us_per_action)
        )
        note = "" if row.status == FINISHED else f" ({row.status})"
        lines.append(f"{error} {energy} {cost} {row.num_inference_steps or '-':>5} {row.epochs:>6}  {label(row)}{note}")
    if len(rows) > SHOWN_ROWS:
        lines.append(f"... and {len(rows) - SHOWN_ROWS} more")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
