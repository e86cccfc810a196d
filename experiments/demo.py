"""The whole pipeline on this machine, in minutes: record, extract, train, evaluate, sweep.

Every stage is one of the commands of the README, run as a user would run it, in the folder runs/demo or --output.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "demo"
CONFIGS = ROOT / "configs"
DATASET = "dataset/pendulum_integrable.yaml"
MODEL = "inverse_dynamics/pendulum_flow.yaml"
TRAIN_EPOCHS, SWEEP_EPOCHS = 60, 5


def stages(smoke: bool) -> list[tuple[str, list[str]]]:
    """Return title and command of each stage."""
    dataset, model = str(CONFIGS / DATASET), str(CONFIGS / MODEL)
    small = ["--smoke"] if smoke else []
    train = ["train.py", "--dataset_config", dataset, "--model_config", model, "--run_dir", "train"]
    return [
        ("record the pendulum in MuJoCo (Ray tasks)", ["collect.py", "--config", dataset, *small]),
        ("extract transitions (Ray Data)", ["create_dataset.py", "--config", dataset]),
        ("train a flow (Ray Train)", [*train, *(small or ["--num_epochs", str(TRAIN_EPOCHS)])]),
        ("evaluate it in the simulator", ["evaluate.py", "--checkpoint", "train", *small]),
        (
            "sweep networks and step counts (Ray Tune)",
            ["sweep.py", "--output", "sweep", *(small or ["--set", f"num_epochs={SWEEP_EPOCHS}"])],
        ),
    ]


def main() -> None:
    """Run the stages in order; the first that fails ends the demo with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="shrink every stage to seconds")
    parser.add_argument("--output", metavar="FOLDER", help="a new or empty folder (default: runs/demo, emptied first)")
    args = parser.parse_args()
    folder = FOLDER
    if args.output:
        folder = Path(args.output).resolve()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            parser.exit(2, f"error: --output must be a new or empty folder, {folder} is not; give another one\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    todo = stages(args.smoke)
    for number, (title, command) in enumerate(todo, start=1):
        shown = shlex.join(part.replace(f"{ROOT}{os.sep}", "") for part in command)
        print(f"\n[{number}/{len(todo)}] {title}\n$ python experiments/{shown}", flush=True)
        script = ROOT / "experiments" / command[0]
        code = subprocess.run([sys.executable, str(script), *command[1:]], cwd=folder, check=False).returncode
        if code:
            sys.exit(code)
    print(f"\ndone in {time.monotonic() - started:.0f} s")
    print(f"sweep:  {folder / 'sweep' / 'results.csv'}")
    print(f"report: {folder / 'train' / 'evaluation' / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
