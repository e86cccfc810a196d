"""How extraction and sweeps scale with the nodes of a cluster, and what a shard and a trial cost the driver.

    python experiments/benchmarks/scaling.py --nodes 1,2,4

The nodes are Ray's own simulated ones, each with one CPU, on this machine. Two kinds of work: `sleep` waits before each
small piece, so that it scales as far as the driver lets it; `CPU` is work alone, which this machine's cores bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extraction import ACTION_DIM, EPISODE_STEPS, STATE_DIM, make_recording
from measure import RESULTS, report
from problem import ROOT, pendulum

from invdyn.models.registry import load_model_config
from invdyn.training import tuning
from invdyn.training.run_config import RunConfig, TrackingConfig
from invdyn.training.sweep_config import SweepConfig
from invdyn.training.trials import Trial
from invdyn.transitions import extract
from invdyn.transitions.dataset_config import DatasetConfig

MODEL = ROOT / "configs" / "inverse_dynamics" / "mlp.yaml"
TASKS = "tasks.jsonl"
HEAD_PROGRAMS = ("gcs_server", "raylet", "dashboard", "log_monitor")


@dataclass(frozen=True)
class Sizes:
    """How much there is to do.

    Attributes:
        trials: of a sweep.
        trial_s: that a sleeping trial sleeps.
        shards: of a recording, each of which is one task.
        shard_s: that a sleeping task sleeps.
        gigabytes: of the recording of the CPU-bound extraction.
        many: how many times as many trials and shards tell what one costs the driver.
        epochs: of a trial that reports often.
        long_epochs: of a trial that computes for long.
    """

    trials: int = 8
    trial_s: float = 6.0
    shards: int = 24
    shard_s: float = 1.0
    gigabytes: float = 2.0
    many: int = 6
    epochs: int = 20
    long_epochs: int = 300


SMOKE = Sizes(trials=2, trial_s=0.1, shards=2, shard_s=0.1, gigabytes=0.0001, many=2, epochs=3, long_epochs=3)


@dataclass(frozen=True)
class Cost:
    """What a job took.

    Attributes:
        wall_s: from its call to its return.
        driver_s: CPU seconds of the driver.
        head_s: CPU seconds of Ray's own processes, those of all simulated nodes.
        start_s: from the call until every node is at work.
        gap_s: that a node waits between two tasks, the median.
        tasks: trials or shards.
    """

    wall_s: float
    driver_s: float
    head_s: float
    start_s: float
    gap_s: float
    tasks: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=numbers, default=(1, 2, 4), metavar="N,N,...", help="sizes of the cluster")
    parser.add_argument("--folder", help="for what the jobs read and write (default: the system's for temporary files)")
    parser.add_argument("--smoke", action="store_true", help="shrink the work to seconds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: runs/benchmarks)")
    args = parser.parse_args()
    sizes = SMOKE if args.smoke else Sizes()
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-", dir=args.folder) as name:
        bench = Bench(Path(name), sizes)
        rows, costs = [], []
        for number in args.nodes:
            with cluster(number):
                rows += bench.scaling(number)
                if number == max(args.nodes):
                    costs = bench.driver_costs()
    report("scaling", "jobs on simulated nodes of one CPU", rows, args.output)
    report("driver_cost", "what one more trial or shard costs", costs, args.output)


def numbers(text: str) -> tuple[int, ...]:
    """Parse a flag's value such as 1,2,4."""
    return tuple(int(word) for word in text.split(","))


@contextmanager
def cluster(num_nodes: int) -> Iterator[None]:
    """Start a cluster of a head without CPUs and nodes with one each, and connect this process to it."""
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}  # before Ray is imported
    import ray
    import ray.data
    from ray.cluster_utils import Cluster

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_nodes):
            nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


class Bench:
    """The jobs, below one folder.

    Args:
        folder: for all that they write.
        sizes: how much there is to do.
    """

    def __init__(self, folder: Path, sizes: Sizes):
        self.folder, self.sizes = folder, sizes
        self.count = 0
        self.store = pendulum(str(folder / "pendulum"), 200)
        self.shard_mb = {
            name: self._record(name, gigabytes, shards)
            for name, gigabytes, shards in (
                ("large", sizes.gigabytes, sizes.shards),
                *((f"small-{shards}", 1e-6, shards) for shards in (sizes.shards, sizes.shards * sizes.many)),
            )
        }

    def scaling(self, nodes: int) -> list[dict[str, Any]]:
        """Run the four jobs on a cluster of so many nodes."""
        sizes = self.sizes
        self.sweep(nodes, 1, 0.0)  # Tune's imports, and the workers' files in the page cache
        jobs = {
            "sweep, sleep": (self.sweep(sizes.trials, 1, sizes.trial_s), sizes.trials * sizes.trial_s),
            "sweep, CPU": (self.sweep(sizes.trials, sizes.long_epochs, 0.0), None),
            "extraction, sleep": (
                self.extraction(f"small-{sizes.shards}", sizes.shard_s),
                sizes.shards * sizes.shard_s,
            ),
            "extraction, CPU": (self.extraction("large", 0.0), None),
        }
        return [
            {
                "job": f"{name}, {nodes} node(s)",
                "s": cost.wall_s,
                "ideal s": ideal and ideal / nodes,
                "s until all work": cost.start_s,
                "s between tasks": cost.gap_s,
            }
            for name, (cost, ideal) in jobs.items()
        ]

    def driver_costs(self) -> list[dict[str, Any]]:
        """Measure what one more trial, one more epoch of a trial and one more shard cost the driver."""
        sizes = self.sizes
        many = sizes.trials * sizes.many
        few, more, often = (self.sweep(n, e, 0.0) for n, e in ((sizes.trials, 1), (many, 1), (many, sizes.epochs)))
        some, all_ = (self.extraction(f"small-{n}", 0.0) for n in (sizes.shards, sizes.shards * sizes.many))
        return [
            slope("trial of one epoch", few, more, more.tasks - few.tasks),
            slope("epoch of a trial", more, often, many * (sizes.epochs - 1)),
            slope("shard", some, all_, all_.tasks - some.tasks),
        ]

    def sweep(self, num_trials: int, epochs: int, sleep_s: float) -> Cost:
        """Run a sweep of one-worker trials, of which as many run at a time as there are nodes."""
        folder = self._new_folder("sweep")
        model = load_model_config(MODEL)
        config = SweepConfig(
            name="scaling", dataset_config="", model_config=str(MODEL), space={"training.seed": [0]}, asha=None
        )
        trials = [
            Trial({"training.seed": seed}, self._run(model, folder / "trials" / str(seed), seed, epochs))
            for seed in range(num_trials)
        ]
        original = tuning.run_or_note

        def run(*arguments: Any) -> None:
            with noted(folder):
                time.sleep(sleep_s)
                original(*arguments)

        # What Tune calls is pickled by value, and this with it.
        tuning.run_or_note = run
        try:
            return measured(lambda: tuning.run_sweep(config, trials, folder), folder)
        finally:
            tuning.run_or_note = original

    def extraction(self, recording: str, sleep_s: float) -> Cost:
        """Extract a recording, a task for each shard."""
        folder = self._new_folder("extraction")
        config = DatasetConfig(
            name="scaling",
            buffer_path=str(self.folder / recording),
            output_path=str(folder / "out"),
            part_size_mb=self.shard_mb[recording],
        )
        original = extract._record_or_error

        def run(*arguments: Any) -> Any:
            with noted(folder):
                time.sleep(sleep_s)
                return original(*arguments)

        extract._record_or_error = run
        try:
            return measured(lambda: extract.create_dataset(config), folder)
        finally:
            extract._record_or_error = original

    def _record(self, name: str, gigabytes: float, shards: int) -> float:
        """Write a recording; return the MB of a shard, as the plan counts them."""
        steps = make_recording(self.folder / name, gigabytes, shards) / shards
        states = steps + steps / EPISODE_STEPS
        return 8 * (states * STATE_DIM + steps * ACTION_DIM) / 2**20

    def _run(self, model: Any, folder: Path, seed: int, epochs: int) -> RunConfig:
        recipe = model.training.replace(num_epochs=epochs, seed=seed)
        tracking = TrackingConfig(mode="disabled")
        return RunConfig.for_dataset(
            self.store, folder, model=model, training=recipe, device="cpu", checkpoints=1, tracking=tracking
        )

    def _new_folder(self, kind: str) -> Path:
        self.count += 1
        folder = self.folder / f"{kind}-{self.count}"
        folder.mkdir()
        return folder


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Note begin and end of a task."""
    begin = time.time()
    yield
    line = json.dumps([os.getpid(), begin, time.time()]) + "\n"
    file = os.open(folder / TASKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line.encode())
    os.close(file)


def measured(job: Callable[[], object], folder: Path) -> Cost:
    """Run a job whose tasks are noted in a folder."""
    started, driver, head = time.time(), time.process_time(), head_cpu_s()
    job()
    wall_s, driver_s, head_s = time.time() - started, time.process_time() - driver, head_cpu_s() - head
    nodes: dict[int, list[list[float]]] = {}
    for line in (folder / TASKS).read_text().splitlines():
        process, *times = json.loads(line)
        nodes.setdefault(process, []).append(times)
    gaps = [after[0] - before[1] for tasks in nodes.values() for before, after in itertools.pairwise(sorted(tasks))]
    start_s = max(min(tasks)[0] for tasks in nodes.values()) - started
    num_tasks = sum(map(len, nodes.values()))
    return Cost(wall_s, driver_s, head_s, start_s, statistics.median(gaps or [0.0]), num_tasks)


def head_cpu_s() -> float:
    """Return the CPU seconds of Ray's own processes that this one has started."""
    import psutil

    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if any(program in " ".join(process.cmdline()[:3]) for program in HEAD_PROGRAMS):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue  # it has ended meanwhile
    return total


def slope(what: str, few: Cost, many: Cost, more: int) -> dict[str, Any]:
    """Return what each of `more` further ones cost."""
    return {
        "one more": what,
        "ms of the driver's CPU": 1e3 * (many.driver_s - few.driver_s) / more,
        "ms of Ray's own CPU": 1e3 * (many.head_s - few.head_s) / more,
        "driver, s for few": few.driver_s,
        "driver, s for many": many.driver_s,
        "further ones": more,
    }


if __name__ == "__main__":
    main()
