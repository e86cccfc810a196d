"""Extraction rows/s: create_dataset against a plain h5py copy of the same bytes and against the loop over steps."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import h5py
import numpy as np
from measure import add_arguments, interleave, ratio, report

from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset

STATE_DIM, ACTION_DIM, EPISODE_STEPS = 24, 6, 500
LOOP_EPISODES = 4


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
    """Read each shard's arrays whole and write state, action and next_state: no boundaries, checks or statistics."""
    target.mkdir(parents=True, exist_ok=True)
    for shard in sorted(source.glob("*.hdf5")):
        with h5py.File(shard, "r") as file, h5py.File(target / shard.name, "w") as out:
            state, action = file["data/state"][()], file["data/action"][()]
            rows = len(action)
            out.create_dataset("state", data=state[:rows].astype(np.float32))
            out.create_dataset("action", data=action)
            out.create_dataset("next_state", data=state[1 : rows + 1].astype(np.float32))


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the recording")
    parser.add_argument("--shards", type=int, default=16)
    add_arguments(parser)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-", dir=args.folder) as name:
        root = Path(name)
        source = root / "sequence" / "random"
        rows = make_recording(source, args.gigabytes, args.shards)
        size = sum(path.stat().st_size for path in source.glob("*.hdf5"))
        config = DatasetConfig(name="random", buffer_path=str(source))
        variants = {
            "create_dataset": lambda: create_dataset(config, local=True, overwrite=True),
            "plain h5py copy": lambda: plain_copy(source, root / "copy"),
            "loop over steps": lambda: step_loop(source, root / "loop.h5"),
        }
        times = interleave(variants, args.rounds)
        counts = {"create_dataset": rows, "plain h5py copy": rows, "loop over steps": LOOP_EPISODES * EPISODE_STEPS}
    per_row = {name: [s / counts[name] for s in seconds] for name, seconds in times.items()}
    table = [
        {
            "way": name,
            "rows": f"{counts[name]:,}",
            "rows/s of CPU": 1.0 / statistics.median(seconds),
            "GB/s of CPU": size / rows / 1e9 / statistics.median(seconds),
            "create_dataset is x faster": ratio(seconds, per_row["create_dataset"]),
        }
        for name, seconds in per_row.items()
    ]
    title = (
        f"extraction of {size / 1e9:.2f} GB, {rows:,} transitions, {args.shards} shards, one core, CPU time, page cache"
    )
    report("extraction", f"{title}, median of {args.rounds}", table, args.output)


if __name__ == "__main__":
    main()
