"""Train an inverse dynamics model on a dataset of transitions.

python experiments/train.py --dataset_config configs/dataset/pendulum_integrable_dynamics_shift.yaml \
    --model_config configs/inverse_dynamics/pendulum_flow.yaml --num_epochs 100 --device cuda
"""

from __future__ import annotations

import argparse
import sys
import time

from common import (
    EXIT_INTERRUPTED,
    add_common_arguments,
    add_hang_timeout,
    connect,
    load_dataset_config,
    positive_int,
    run_command,
)

from invdyn import storage
from invdyn.errors import ConfigError
from invdyn.models.recipe import TrainingRecipe
from invdyn.models.registry import load_model_config
from invdyn.training.checkpoint import CHECKPOINTS
from invdyn.training.distributed import check_new_folder, check_run, choose_gpu, fewest_workers, train_checked
from invdyn.training.run_config import HANG_TIMEOUT_S, RunConfig, TrackingConfig, resolve_device
from invdyn.transitions.store import TransitionStore
from invdyn.url_path import as_path

SMOKE_EPOCHS = 1
COMPILE = {"auto": None, "on": True, "off": False}
RECIPE_FLAGS = ("num_epochs", "learning_rate", "batch_size", "seed")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_config", help="YAML of the dataset")
    parser.add_argument("--model_config", help="YAML of the model; --set changes its values")
    parser.add_argument("--num_epochs", type=positive_int, help="passes over the train split")
    parser.add_argument("--learning_rate", type=float, help="peak learning rate")
    parser.add_argument("--batch_size", type=positive_int, help="rows per step over all workers")
    parser.add_argument("--seed", type=int, help="of weights, order and noise")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the model config's, else auto)")
    parser.add_argument(
        "--compile",
        choices=tuple(COMPILE),
        nargs="?",
        const="on",
        help="take the steps as one compiled graph: on, off, or auto (default): in runs long enough to pay for it",
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="of the products in a step (default: float32)"
    )
    parser.add_argument("--cpu_threads", type=positive_int, help="threads of each CPU worker (default: 1)")
    parser.add_argument("--run_dir", help="folder or URL of the run (default: runs/DATASET/MODEL-TIME)")
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue a run from its latest checkpoint")
    parser.add_argument(
        "--min_workers",
        type=positive_int,
        metavar="N",
        help="elastic: go on with as few workers when nodes leave, with up to --num_workers when nodes join",
    )
    add_hang_timeout(parser)
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Train, and print where the run is."""
    args = parse_arguments()
    config = resumed_run(args) if args.resume else new_run(args)
    check_run(config, args.local)  # before Ray takes seconds to start
    if not args.resume:
        check_new_folder(as_path(config.run_dir))
    device = str(resolve_device(config.device)) if args.local else ""
    connect(args, lambda resources: plan_workers(config, resources), device=device)
    try:
        metrics = train_checked(config, local=args.local)
    except KeyboardInterrupt:
        print(f"interrupted; continue with --resume {config.run_dir}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    print(f"run: {config.run_dir}")


def plan_workers(config: RunConfig, resources: dict[str, float]) -> str:
    """Return what the run will use of a cluster.

    Raises:
        ConfigError: when it asks for GPUs that the cluster has not.
    """
    fewest = fewest_workers(config)
    device = "GPU" if choose_gpu(config.device, resources, fewest) else "CPU"
    workers = config.num_workers if fewest == config.num_workers else f"{fewest} to {config.num_workers}"
    return f"{workers} worker(s) with 1 {device} each"


def new_run(args: argparse.Namespace) -> RunConfig:
    """Assemble a run from the configs and flags.

    Raises:
        ConfigError: for a flag or config that cannot be used.
        DataError: when the dataset is missing or unfinished.
    """
    if not args.dataset_config or not args.model_config:
        raise ConfigError(
            "a new run needs --dataset_config and --model_config; an old one continues with --resume RUN_DIR"
        )
    dataset = load_dataset_config(args.dataset_config, args.storage)
    model = load_model_config(args.model_config, args.overrides)
    model = model.replace(training=apply_flags(model.training, args))
    store = TransitionStore(dataset.transitions_path)
    return RunConfig.for_dataset(
        store,
        args.run_dir or dataset.below_storage(f"runs/{dataset.name}/{model.name}-{time.strftime('%Y%m%d-%H%M%S')}"),
        model=model,
        training=model.training,
        device=args.device or model.device or "auto",
        num_workers=args.num_workers or 1,
        min_workers=args.min_workers,
        hang_timeout_s=HANG_TIMEOUT_S if args.hang_timeout_s is None else args.hang_timeout_s,
        compile=COMPILE[args.compile or "auto"],
        precision=args.precision or "float32",
        cpu_threads=args.cpu_threads or 1,
        tracking=TrackingConfig(mode=args.wandb),
    )


def apply_flags(recipe: TrainingRecipe, args: argparse.Namespace) -> TrainingRecipe:
    """Return the recipe with the given flags in place of its values."""
    given = {name: getattr(args, name) for name in RECIPE_FLAGS if getattr(args, name) is not None}
    if args.smoke:
        given.setdefault("num_epochs", SMOKE_EPOCHS)
    return recipe.replace(**given)


def resumed_run(args: argparse.Namespace) -> RunConfig:
    """Return the config of the run to continue; only where and how it runs may change.

    Raises:
        ConfigError: when a flag would change the run itself, or the folder is not a run.
    """
    fixed = ("dataset_config", "model_config", "storage", "run_dir", "compile", "precision", "smoke", *RECIPE_FLAGS)
    # By identity: a seed of 0 is a given flag too.
    given = [name for name in fixed if getattr(args, name) is not None and getattr(args, name) is not False]
    changed = [f"--{name}" for name in given] + (["--set"] if args.overrides else [])
    if changed:
        raise ConfigError(f"--resume continues a run as it was started; drop {', '.join(changed)} or start a new run")
    folder = as_path(storage.absolute(args.resume))
    if folder.parent.name == CHECKPOINTS:
        raise ConfigError(f"--resume takes a run folder, got the checkpoint {folder}; give {folder.parent.parent}")
    config = RunConfig.load(folder)
    tracking = config.tracking.replace(mode=args.wandb) if args.wandb else config.tracking
    return config.replace(
        run_dir=str(folder),
        device=args.device or config.device,
        num_workers=args.num_workers or config.num_workers,
        min_workers=args.min_workers or config.min_workers,
        hang_timeout_s=config.hang_timeout_s if args.hang_timeout_s is None else args.hang_timeout_s,
        cpu_threads=args.cpu_threads or config.cpu_threads,
        tracking=tracking,
    )


if __name__ == "__main__":
    run_command(main)
