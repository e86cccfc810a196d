"""Extraction: create_dataset on one core and on Ray, against a plain h5py copy of the same rows and a loop over steps.

    python experiments/benchmarks/extraction.py --gigabytes 1 4 16 --folder /dev/shm

Measured: wall and CPU seconds (Ray's workers included), the most memory that a process held, and what starting Ray
costs. --folder decides the disk: on one that is slower than the cores, every way of writing takes the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from measure import add_arguments, cpu_seconds, report

from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset

STATE_DIM, ACTION_DIM, EPISODE_STEPS = 24, 6, 500
LOOP_EPISODES = 4
ONE_CORE, RAY, COPY, LOOP = "create_dataset, one core", "create_dataset, Ray", "plain h5py copy", "loop over steps"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds, CPU seconds of all its processes, and the most memory that one of them held."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def make_recording(folder: Path, gigabytes: float, shards: int) -> int:
    """Write random sequences in the native format, and return their number of transitions."""
    bytes_per_step = 8 * STATE_DIM + 4 * ACTION_DIM
    episodes = max(LOOP_EPISODES, round(gigabytes * 1e9 / bytes_per_step / EPISODE_STEPS / shards))
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    state = rng.standard_normal((episodes * (EPISODE_STEPS + 1), STATE_DIM))
    action = rng.standard_normal((episodes * EPISODE_STEPS, ACTION_DIM)).astype(np.float32)
    for shard in range(shards):
        with h5py.File(folder / f"shard-{shard:05d}.hdf5", "w") as file:
            file["data/state"] = state
            file["data/action"] = action
            file["meta/episode_ends"] = np.arange(1, episodes + 1) * EPISODE_STEPS
            file["meta/state_ends"] = np.arange(1, episodes + 1) * (EPISODE_STEPS + 1)
    return episodes * EPISODE_STEPS * shards


def plain_copy(source: Path, target: Path) -> None:
    """Read each shard's arrays whole, slice its episodes, write the same columns: no checks, hashes or statistics."""
    target.mkdir(parents=True, exist_ok=True)
    first_episode = 0
    for shard in sorted(source.glob("*.hdf5")):
        with h5py.File(shard, "r") as file, h5py.File(target / shard.name, "w") as out:
            state, action = file["data/state"][()].astype(np.float32), file["data/action"][()]
            ends = file["meta/state_ends"][()]
            starts = np.concatenate([[0], ends[:-1]])
            episodes = list(zip(starts, ends, strict=True))
            lengths = ends - starts - 1
            out["state"] = np.concatenate([state[first : stop - 1] for first, stop in episodes])
            out["action"] = action
            out["next_state"] = np.concatenate([state[first + 1 : stop] for first, stop in episodes])
            out["episode"] = np.repeat(np.arange(first_episode, first_episode + len(episodes)), lengths)
            out["step"] = np.concatenate([np.arange(length) for length in lengths])
        first_episode += len(episodes)


def step_loop(source: Path, target: Path) -> int:
    """Append one transition after another, as a first version often does; return how many."""
    shard = min(source.glob("*.hdf5"))
    states, actions, next_states = [], [], []
    with h5py.File(shard, "r") as file:
        for episode in range(LOOP_EPISODES):
            for step in range(EPISODE_STEPS):
                row = episode * (EPISODE_STEPS + 1) + step
                states.append(file["data/state"][row])
                actions.append(file["data/action"][episode * EPISODE_STEPS + step])
                next_states.append(file["data/state"][row + 1])
    with h5py.File(target, "w") as out:
        out["state"], out["action"], out["next_state"] = (
            np.array(rows, dtype=np.float32) for rows in (states, actions, next_states)
        )
    return len(states)


def measured_alone(run: Callable[..., object], *arguments: object) -> Cost:
    """Measure a function of this module in a fresh process, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (run, *arguments))


def _measure(run: Callable[..., object], *arguments: object) -> Cost:
    started, cpu = time.perf_counter(), cpu_seconds()
    run(*arguments)
    wall_s, cpu_s = time.perf_counter() - started, cpu_seconds() - cpu
    return Cost(wall_s, cpu_s, peak_mb(Path("/proc/self")))


def measured_on_ray(run: Callable[[], object]) -> Cost:
    """Measure a function of this process and Ray's workers: the CPU time of all, the memory of the largest worker."""
    before = {pid: ticks for pid, ticks, _ in ray_workers()}
    started, cpu = time.perf_counter(), cpu_seconds()
    run()
    wall_s, own_s = time.perf_counter() - started, cpu_seconds() - cpu
    after = list(ray_workers())
    ticks = sum(ticks - before.get(pid, 0) for pid, ticks, _ in after)
    return Cost(wall_s, own_s + ticks / TICKS_PER_S, max(peak for _, _, peak in after))


def ray_workers() -> Iterator[tuple[int, int, float]]:
    """Yield (process, CPU ticks, peak MB) of Ray's workers on this machine; Linux only."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it may have ended
            if not (folder / "cmdline").read_bytes().startswith(b"ray::"):
                continue
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            yield int(folder.name), int(fields[11]) + int(fields[12]), peak_mb(folder)


def peak_mb(process: Path) -> float:
    """Return the most memory that a process held; getrusage would count what its parent held when it started it."""
    return int((process / "status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def start_ray(num_workers: int) -> dict[str, float]:
    """Start Ray and its first Ray Data job, and return the seconds of each."""
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    started = time.perf_counter()
    import ray
    import ray.data

    ray.init(
        address="local", num_cpus=num_workers, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    connected = time.perf_counter()
    ray.data.from_items([0] * num_workers, override_num_blocks=num_workers).map(lambda row: row).take_all()
    return {"ray.init": connected - started, "first Ray Data job": time.perf_counter() - connected}


def extract(config: DatasetConfig, num_workers: int | None) -> None:
    """Run create_dataset on Ray, or in this process when `num_workers` is None."""
    create_dataset(config, local=num_workers is None, num_workers=num_workers)


def measure_size(root: Path, gigabytes: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every way of extracting one recording, in turn."""
    source, target = root / f"sequence/random-{gigabytes:g}", root / "target"
    rows = make_recording(source, gigabytes, args.shards)
    size = sum(path.stat().st_size for path in source.glob("*.hdf5"))
    config = DatasetConfig(name="random", buffer_path=str(source), output_path=str(target))
    ways: dict[str, Callable[[], Cost]] = {
        ONE_CORE: lambda: measured_alone(extract, config, None),
        RAY: lambda: measured_on_ray(lambda: extract(config, args.num_workers)),
        COPY: lambda: measured_alone(plain_copy, source, target),
        LOOP: lambda: measured_alone(step_loop, source, root / "loop.h5"),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    warm_up = gigabytes <= args.warm_up_gb
    for number in range(args.rounds + warm_up):
        for name, run in ways.items():
            cost = run()
            shutil.rmtree(target, ignore_errors=True)  # the next one must not be spared the work
            if number >= warm_up:
                costs[name].append(cost)
    return [_row(name, rows, size, costs, gigabytes) for name in ways]


def _row(name: str, rows: int, size: int, costs: dict[str, list[Cost]], gigabytes: float) -> dict[str, Any]:
    mine = costs[name]
    done = LOOP_EPISODES * EPISODE_STEPS if name == LOOP else rows
    wall_s, cpu_s = (statistics.median(getattr(cost, key) for cost in mine) for key in ("wall_s", "cpu_s"))

    def against(other: str, key: str) -> float | None:
        """How many times faster this is than another way, per row; the median over the rounds."""
        other_done = LOOP_EPISODES * EPISODE_STEPS if other == LOOP else rows
        pairs = zip(costs[other], mine, strict=True)
        return statistics.median(getattr(a, key) / other_done / (getattr(b, key) / done) for a, b in pairs)

    return {
        "way": f"{gigabytes:g} GB, {name}",
        "rows/s": done / wall_s,
        "GB/s": size * done / rows / 1e9 / wall_s,
        "wall s per GB": wall_s / (size * done / rows / 1e9),
        "CPU s per GB": cpu_s / (size * done / rows / 1e9),
        "peak MB of a process": max(cost.peak_mb for cost in mine),
        "x copy, wall": against(COPY, "wall_s"),
        "x copy, CPU": against(COPY, "cpu_s"),
        "x loop, CPU": against(LOOP, "cpu_s"),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0], help="sizes of the recording")
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=2, help="Ray workers (default: %(default)s)")
    parser.add_argument("--warm_up_gb", type=float, default=4.0, help="larger recordings get no round to warm up")
    add_arguments(parser)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    start_up = start_ray(args.num_workers)
    table = []
    for gigabytes in args.gigabytes:
        with tempfile.TemporaryDirectory(prefix="invdyn-bench-", dir=args.folder) as name:
            table += measure_size(Path(name), gigabytes, args)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in start_up.items())
    title = f"extraction, {args.shards} shards, {args.num_workers} Ray workers; median of {args.rounds}"
    report("extraction", f"{title}; start-up, not counted: {seconds}", table, args.output)


if __name__ == "__main__":
    main()
