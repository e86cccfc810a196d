"""Evaluate a trained model on the held-out split of its dataset, next to baselines, and write a report.

python experiments/evaluate.py --checkpoint RUN_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import device_name, positive_int, run_command, say_local

from invdyn.config import load_config
from invdyn.errors import DataError
from invdyn.evaluation.evaluate import (
    MAX_ROWS,
    NUM_SAMPLES,
    STEP_COUNTS,
    check_dimensions,
    check_request,
    evaluate,
    linear_baseline,
)
from invdyn.evaluation.findings import LINEAR, MLP, warnings
from invdyn.evaluation.report import dataset_facts, make_folder, write_report
from invdyn.evaluation.results import Evaluation
from invdyn.evaluation.summary import summary_table
from invdyn.models.base import InverseDynamics
from invdyn.models.registry import load_model_config
from invdyn.training.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, load_checkpoint
from invdyn.training.distributed import train
from invdyn.training.run_config import RunConfig, TrackingConfig, resolve_device
from invdyn.training.tracking import METRICS_CSV
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.plan import SPLITS
from invdyn.transitions.store import TransitionStore
from invdyn.url_path import as_path

BASELINES = (LINEAR, MLP)
MLP_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "inverse_dynamics" / "mlp.yaml"
SMOKE_ROWS = 500
SMOKE_STEP_COUNTS = (1, 2, 4)
OUTPUT_FOLDER = "evaluation"
DEFAULT_SPLIT = "test"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN_DIR", help="a run, or one of its checkpoints")
    parser.add_argument("--dataset_config", help="YAML of another dataset (default: the one the model was trained on)")
    parser.add_argument(
        "--split", choices=SPLITS, default=DEFAULT_SPLIT, help="rows to evaluate (default: %(default)s)"
    )
    parser.add_argument(
        "--step_counts",
        type=parse_step_counts,
        metavar="N,N,...",
        help="solver steps to try, besides the model's own number",
    )
    parser.add_argument("--num_samples", type=positive_int, default=NUM_SAMPLES, help="predictions per transition")
    parser.add_argument("--max_rows", type=positive_int, help=f"rows to use (default: {MAX_ROWS})")
    parser.add_argument(
        "--baselines", type=baseline_names, default=BASELINES, help="linear,mlp (default), one, or none"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the rows and the noise")
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--output",
        help="folder of the report (default: RUN_DIR/evaluation, and in its name what is not the default: another "
        "checkpoint than the best, dataset or split)",
    )
    parser.add_argument("--smoke", action="store_true", help="shrink the work to seconds on a CPU")
    return parser.parse_args()


def main() -> None:
    """Evaluate, write the report, print a table and where the report is."""
    args = parse_arguments()
    device = resolve_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint, str(device))
    store = TransitionStore(dataset_path(args, checkpoint.config))
    name = checkpoint.config.model.name
    check_dimensions(name, checkpoint.model, store)
    step_counts = args.step_counts or (SMOKE_STEP_COUNTS if args.smoke else STEP_COUNTS)
    max_rows = args.max_rows or (SMOKE_ROWS if args.smoke else MAX_ROWS)
    check_request(store, args.split, step_counts, args.num_samples, max_rows)
    output = as_path(args.output) if args.output else checkpoint.run_dir / output_name(checkpoint, store, args.split)
    make_folder(output)
    say_local(str(device))
    models = {name: checkpoint.model}
    models |= {other: model for other, model in baselines(checkpoint, store, args.baselines).items() if other != name}
    evaluation = evaluate(
        models,
        store,
        split=args.split,
        step_counts=step_counts,
        num_samples=args.num_samples,
        max_rows=max_rows,
        seed=args.seed,
        device=device,
    )
    extra_warnings = checkpoint_warnings(checkpoint, store)
    report = write_report(
        evaluation,
        output,
        title=f"{name} on {store.manifest['name']}",
        sections={"Dataset": dataset_facts(store, args.split), **checkpoint_facts(checkpoint)},
        extra_warnings=extra_warnings,
        metrics_csv=checkpoint.run_dir / METRICS_CSV,
    )
    print_summary(evaluation, extra_warnings)
    print(f"report: {report}")


def baselines(
    checkpoint: Checkpoint, store: TransitionStore, names: tuple[str, ...] = BASELINES
) -> dict[str, InverseDynamics]:
    """Return the baselines, in the order of their quality to expect.

    All are made from the rows that the model was trained on, whichever it is evaluated on; the linear inverse, which
    takes no time, from those of the dataset at hand where they are gone.
    """
    trained_on = training_dataset(checkpoint.config, store)
    models: dict[str, InverseDynamics] = {}
    if MLP in names and trained_on is not None:
        models[MLP] = mlp_baseline(checkpoint, trained_on)
    elif MLP in names:
        path = checkpoint.config.dataset_path
        print(f"without the MLP baseline: the rows that the model was trained on are not in {path}")
    if LINEAR in names:
        models[LINEAR] = linear_baseline(trained_on or store)
    return models


def output_name(checkpoint: Checkpoint, store: TransitionStore, split: str) -> str:
    """Return the name of the report's folder: no report takes the place of one of other rows or weights."""
    parts = [OUTPUT_FOLDER]
    if checkpoint.folder != find_checkpoint(checkpoint.run_dir):
        parts.append(checkpoint.folder.name)
    if store.content_hash != checkpoint.config.dataset_hash:
        parts += [store.manifest["name"], store.content_hash[:8]]
    if split != DEFAULT_SPLIT:
        parts.append(split)
    return "-".join(parts)


def training_dataset(config: RunConfig, store: TransitionStore) -> TransitionStore | None:
    """Return the dataset of the training run: the given one if it has its rows; None where those are gone."""
    if store.content_hash == config.dataset_hash:
        return store
    try:
        own = TransitionStore(config.dataset_path)
    except DataError:
        return None
    return own if own.content_hash == config.dataset_hash else None


def mlp_baseline(checkpoint: Checkpoint, store: TransitionStore) -> InverseDynamics:
    """Return MLP regression trained on the model's rows for the same number of steps; trained once, then loaded.

    Raises:
        DataError: when it cannot be trained or its folder not be written.
    """
    config = load_model_config(MLP_CONFIG)
    recipe = checkpoint.config.training
    device = str(checkpoint.model.device)
    run = RunConfig.for_dataset(
        store,
        checkpoint.run_dir / "baselines" / f"mlp-{store.content_hash[:8]}",
        model=config,
        training=config.training.replace(num_epochs=recipe.num_epochs, batch_size=recipe.batch_size, seed=recipe.seed),
        device=device,
        checkpoints=1,
        tracking=TrackingConfig(mode="disabled"),
    )
    if not list_checkpoints(run.run_dir):
        print(f"training the MLP baseline: {run.training.num_epochs} epochs", flush=True)
        train(run, local=True, resume=True)
    return load_checkpoint(run.run_dir, device).model


def dataset_path(args: argparse.Namespace, config: RunConfig) -> str:
    """Return the transitions folder to evaluate on."""
    if args.dataset_config:
        return load_config(DatasetConfig, args.dataset_config).transitions_path
    return config.dataset_path


def checkpoint_warnings(checkpoint: Checkpoint, store: TransitionStore) -> list[str]:
    """Return a warning when the model is not trained to the end, and when it was on other rows than the dataset's."""
    config = checkpoint.config
    found = [f"The checkpoint is {told}."] if (told := checkpoint.unfinished) else []
    if store.content_hash != config.dataset_hash:
        found.append(
            f"The model was trained on other rows: dataset {config.dataset_name}, content hash {config.dataset_hash}."
        )
    return found


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, dict[str, object]]:
    """Return what the report says about the checkpoint: sections of names and values."""
    config = checkpoint.config
    where: dict[str, object] = {"path": checkpoint.folder.resolve(), "workers": config.num_workers}
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    model = {name: value for name, value in config.model.to_values().items() if name != "training"}
    return {
        "Checkpoint": where | {"parameters": f"{parameters:,}"} | dict(checkpoint.metrics),
        "Model": model,
        "Training": config.training.model_dump(mode="json"),
        "Versions": dict(config.versions),
    }


def print_summary(evaluation: Evaluation, extra_warnings: list[str]) -> None:
    """Print the table of results, the best of each column marked by a star, and the warnings."""
    table = summary_table(evaluation)
    cells = [
        [f"{cell}{'*' if (row, column) in table.best else ' '}" for column, cell in enumerate(line)]
        for row, line in enumerate(table.rows)
    ]
    header = [f"{name} " for name in table.header]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    print(f"{evaluation.num_rows:,} rows of {evaluation.split}, {evaluation.device} (* best of its column)")
    for line in [header, *cells]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    for warning in [*extra_warnings, *warnings(evaluation)]:
        print(f"warning: {warning}")


def parse_step_counts(text: str) -> tuple[int, ...]:
    """Parse 1,2,4."""
    return tuple(positive_int(part.strip()) for part in text.split(","))


def seed_number(text: str) -> int:
    """Parse a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or above, got {text!r}")
    return int(text)


def baseline_names(text: str) -> tuple[str, ...]:
    """Parse linear,mlp or none."""
    names = tuple(part.strip() for part in text.split(",") if part.strip() and part.strip() != "none")
    for name in names:
        if name not in BASELINES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(BASELINES)}, or none; got {name!r}")
    return names


if __name__ == "__main__":
    run_command(main)
