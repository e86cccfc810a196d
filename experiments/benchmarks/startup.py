"""Seconds from the command to the first training step, and where they go: in one process, and on Ray."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import add_arguments, report
from problem import ROOT, pendulum

PLACES = {
    "--local": ["--local"],
    "Ray, 1 worker": ["--num_workers", "1"],
    "Ray, 2 workers": ["--num_workers", "2"],
    "--local, compiled": ["--local", "--compile", "on"],
}
PARTS = {
    "Python and imports": "imported",
    "config and dataset checked": "checked",
    "ray.init": "connected",
    "workers started, group joined": "in the loop",
    "dataset loaded, model built": "before the first step",
    "first steps": "after the first chunk",
}
MARKS = "INVDYN_MARKS"


def main() -> None:
    """Measure and print; with INVDYN_MARKS set, be the command that is measured."""
    if MARKS in os.environ:
        train_with_marks()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=1000, help="episodes to record (default: %(default)s)")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled run")
    add_arguments(parser)
    args = parser.parse_args()
    places = {name: flags for name, flags in PLACES.items() if not (args.no_compile and "--compile" in flags)}
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as name:
        pendulum(f"{name}/data", args.episodes)
        found: dict[str, list[dict[str, float]]] = {place: [] for place in places}
        for number in range(args.rounds):
            for index, (place, flags) in enumerate(places.items()):
                found[place].append(seconds(Path(name), f"{index}-{number}", flags))
    rows = [
        {"seconds": part, **{place: statistics.median(each[part] for each in found[place]) for place in places}}
        for part in (*PARTS, "all")
    ]
    report("startup", "seconds from the command to the first training step (medians)", rows, args.output)


def seconds(folder: Path, name: str, flags: list[str]) -> dict[str, float]:
    """Run the train command once; return the seconds of each part of its start."""
    marks = folder / f"{name}.marks"
    configs = ROOT / "configs"
    command = [
        *(sys.executable, __file__, "--dataset_config", str(configs / "dataset" / "pendulum_integrable.yaml")),
        *("--model_config", str(configs / "inverse_dynamics" / "pendulum_flow.yaml"), "--num_epochs", "1"),
        *("--run_dir", str(folder / name), "--wandb", "disabled", "--device", "cpu", *flags),
    ]
    # Nothing compiled before is found again.
    environment = {**os.environ, MARKS: str(marks), "TORCHINDUCTOR_CACHE_DIR": str(folder / f"{name}.compiled")}
    begin = time.time()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    times: dict[str, float] = {}
    for line in marks.read_text().splitlines():
        what, when = json.loads(line)
        times.setdefault(what, when)
    times.setdefault("connected", times["checked"])
    times.setdefault("in the loop", times["connected"])
    ends = [begin, *(times[what] for what in PARTS.values())]
    parts = {part: end - start for part, start, end in zip(PARTS, ends, ends[1:], strict=False)}
    return {**parts, "all": ends[-1] - begin}


def train_with_marks() -> None:
    """Be train.py, noting when it gets where."""
    sys.path.insert(0, str(ROOT / "experiments"))
    import train

    from invdyn.training import distributed

    file = os.environ[MARKS]
    mark(file, "imported")
    train.check_run = followed_by(train.check_run, file, "checked")
    train.connect = followed_by(train.connect, file, "connected")
    worker_main, train_loop = distributed._worker_main, distributed.train_loop

    def marked_worker(*arguments: Any) -> Any:
        mark(file, "in the loop")
        mark_first_steps(file)
        return worker_main(*arguments)

    def marked_loop(*arguments: Any) -> Any:
        mark_first_steps(file)
        return train_loop(*arguments)

    # What Ray calls on a worker is pickled by value, and this with it; the other is called in this process.
    distributed._worker_main, distributed.train_loop = marked_worker, marked_loop
    train.run_command(train.main)


def followed_by(function: Callable[..., Any], file: str, what: str) -> Callable[..., Any]:
    """Return a function that notes when it has returned."""

    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        mark(file, what)
        return result

    return call


def mark_first_steps(file: str) -> None:
    """Note begin and end of the first chunk of steps in this process."""
    from invdyn.training.trainer import Trainer

    train_chunk = Trainer.train_chunk

    def marked(*arguments: Any) -> Any:
        mark(file, "before the first step")
        result = train_chunk(*arguments)
        mark(file, "after the first chunk")
        Trainer.train_chunk = train_chunk
        return result

    Trainer.train_chunk = marked


def mark(file: str, what: str) -> None:
    """Note when something has happened."""
    with Path(file).open("a", encoding="utf-8") as out:
        out.write(json.dumps([what, time.time()]) + "\n")


if __name__ == "__main__":
    main()
