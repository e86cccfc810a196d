"""What a sweep costs beyond training: wall time per one-worker trial that is not spent in optimizer steps."""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path

from measure import RESULTS, report
from problem import ROOT, pendulum

from invdyn.models.registry import load_model_config
from invdyn.training.run_config import RunConfig, TrackingConfig
from invdyn.training.sweep_config import SweepConfig, model_of_trial, trial_name
from invdyn.training.trials import Trial
from invdyn.training.tuning import run_sweep

NUM_TRIALS = 16


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--trials", type=int, default=NUM_TRIALS)
    parser.add_argument("--episodes", type=int, help="episodes to record (default: the dataset config's)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: runs/benchmarks)")
    parser.add_argument("--wandb", choices=("offline", "disabled"), default="offline")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as name:
        folder = Path(name)
        store = pendulum(name, args.episodes)
        model_file = ROOT / "configs" / "inverse_dynamics" / "pendulum_flow.yaml"
        sweep = SweepConfig(
            name="overhead",
            dataset_config="",
            model_config=str(model_file),
            space={"training.seed": list(range(args.trials)), "num_inference_steps": [1, 2, 4, 8]},
            asha=None,
        )
        base = load_model_config(model_file)
        trials = []
        for index, settings in enumerate(sweep.network_settings()):
            model = model_of_trial(base, settings)
            run = RunConfig.for_dataset(
                store,
                folder / "sweep" / "trials" / trial_name(index, settings),
                model=model,
                training=model.training.replace(num_epochs=args.epochs),
                device="cpu",
                checkpoints=2,
                tracking=TrackingConfig(mode=args.wandb, group="overhead"),
            )
            trials.append(Trial(settings, run))
        started = time.perf_counter()
        import ray

        ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR")
        connected = time.perf_counter()
        run_sweep(sweep, trials, folder / "sweep", max_concurrent=1)
        ended = time.perf_counter()
        training_s = sum(_elapsed_s(Path(trial.run.run_dir)) for trial in trials)
        ray.shutdown()
    beyond_s = ended - connected - training_s
    rows = [
        {"part": "training steps", "s per trial": training_s / args.trials},
        {"part": "everything else", "s per trial": beyond_s / args.trials},
        {"part": "Ray's start, shared by all", "s per trial": (connected - started) / args.trials},
    ]
    title = (
        f"a sweep of {args.trials} one-worker trials, one at a time, W&B {args.wandb}, four step counts evaluated each"
    )
    report("sweep_overhead", title, rows, args.output)


def _elapsed_s(run_dir: Path) -> float:
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["elapsed_s"])


if __name__ == "__main__":
    main()
