"""Extract transitions from a recording.

python experiments/create_dataset.py --config configs/dataset/pendulum_integrable_dynamics_shift.yaml --max_samples 1000
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack

from common import (
    EXIT_INTERRUPTED,
    add_common_arguments,
    connect,
    load_dataset_config,
    plan_tasks,
    positive_int,
    run_command,
)

from invdyn.doctor.examine import diagnose
from invdyn.doctor.findings import summarize
from invdyn.evaluation.plots import plot_distributions
from invdyn.progress import Progress
from invdyn.storage import join
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import Listener, create_dataset
from invdyn.transitions.plan import SPLITS
from invdyn.transitions.store import TransitionStore

SMOKE_SAMPLES = 1000
DOCTOR_ROWS = 20_000
DISTRIBUTIONS_PNG = "distributions.png"


def main() -> None:
    """Extract, and print what was kept, what was dropped, and where it is."""
    args = parse_arguments()
    config = load_dataset_config(args.config, args.storage, args.overrides)
    if args.on_error == "skip":
        config = config.replace(format_options={**config.format_options, "on_error": "skip"})
    max_samples = args.max_samples or (SMOKE_SAMPLES if args.smoke else None)
    store = extract(config, max_samples, args)
    try:
        show(store, config, args)
    except KeyboardInterrupt:
        print(f"interrupted; the dataset is finished: {store.path}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def show(store: TransitionStore, config: DatasetConfig, args: argparse.Namespace) -> None:
    """Plot and print what is in a finished dataset, and what the doctor says of its recording."""
    plot_distributions(store, join(store.path, DISTRIBUTIONS_PNG))
    num_rows = store.manifest["num_rows"]
    if args.max_samples and num_rows < args.max_samples:
        print(f"warning: --max_samples asks for {args.max_samples:,} transitions, there are {num_rows:,}: all are kept")
    print(summary(store))
    findings = diagnose(config, max_rows=DOCTOR_ROWS, without=store.manifest["skipped_files"]).findings
    print(summarize(findings))
    changes = [*([f"storage={args.storage}"] if args.storage else []), *args.overrides]
    flags = ["--config", args.config, *(word for change in changes for word in ("--set", change))]
    print(f"more: {shlex.join(['python', 'experiments/doctor.py', *flags])}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="dataset config")
    parser.add_argument(
        "--max_samples",
        type=positive_int,
        metavar="N",
        help="exact number of transitions of all splits; all where there are fewer",
    )
    parser.add_argument(
        "--on_error", choices=("fail", "skip"), default="fail", help="at a damaged file (default: fail)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier dataset in the same folder")
    add_common_arguments(parser)
    return parser.parse_args()


def extract(config: DatasetConfig, max_samples: int | None, args: argparse.Namespace) -> TransitionStore:
    """Run the extraction with progress bars; Ray starts only when the plan is sound."""
    with Bars(config.name, args) as bars:
        return create_dataset(
            config,
            max_samples=max_samples,
            overwrite=args.overwrite,
            local=args.local,
            num_workers=args.num_workers,
            listener=Listener(
                on_scan=lambda tasks: bars.start(tasks, "scan", "parts"),
                on_scanned=lambda: bars.update(1),
                on_plan=lambda plan: bars.start(plan.num_rows, "extract", "transitions"),
                on_rows=bars.update,
                on_skip=bars.report,
                on_fault=bars.say,
            ),
        )


class Bars(ExitStack):
    """One progress bar at a time; Ray starts with the first."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        super().__init__()
        self._name, self._args = name, args
        self._bar: Progress | None = None

    def start(self, total: int, verb: str, unit: str) -> None:
        """End the last bar and show the next."""
        if self._bar is None:
            connect(self._args, plan_tasks(self._args.num_workers), uses_data=True)
        self.close()
        self._bar = self.enter_context(Progress(total, f"{verb} {self._name}", unit))

    def update(self, count: int) -> None:
        """Count finished work."""
        assert self._bar is not None, "work was done before any was planned"
        self._bar.update(count)

    def say(self, line: str) -> None:
        """Show a line that stays."""
        assert self._bar is not None, "nothing can fail before it is planned"
        self._bar.say(line)

    def report(self, damaged: Mapping[str, str]) -> None:
        """Say that files are left out."""
        self.close()
        print(f"damaged files: {len(damaged)}; planning again without them", file=sys.stderr)


def summary(store: TransitionStore) -> str:
    """Return the counts of a finished dataset."""
    splits = store.manifest["splits"]
    counts = ", ".join(f"{s} {splits[s]['rows']:,} ({splits[s]['episodes']:,} episodes)" for s in SPLITS)
    row = ", ".join(f"{name} {value}" for name, value in store.manifest["row"].items() if value is not None)
    drops = ", ".join(f"{reason} {count:,}" for reason, count in store.manifest["drops"].items() if count)
    notes = [f"warning: {text}" for text in store.manifest["warnings"]]
    constant = store.constant_dims
    if constant is not None and (constant.state or constant.action):
        named = {"state": [dim for dim, _ in constant.state], "action": [dim for dim, _ in constant.action]}
        notes.append(f"constant dimensions left out: {named}; restored at prediction")
    skipped = store.manifest["skipped_files"]
    notes += [f"skipped: {path}: {reason}" for path, reason in skipped.items()]
    notes += [f"skipped files: {len(skipped)}"] if skipped else []
    return "\n".join(
        [
            *notes,
            f"{store.manifest['num_rows']:,} transitions: {counts}",
            f"dropped actions: {drops or 'none'}",
            f"row: {row}; hash {store.content_hash}",
            f"dataset: {store.path}",
        ]
    )


if __name__ == "__main__":
    run_command(main)
