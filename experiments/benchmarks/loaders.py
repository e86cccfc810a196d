"""Loader rows/s at batch 256 and 8192: resident and streaming, against plain tensors in memory and training."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from extraction import ACTION_DIM, EPISODE_STEPS, STATE_DIM, make_recording
from measure import add_arguments, interleave, ratio, report
from problem import ROOT

from invdyn.models.registry import build_model, load_model_config
from invdyn.training.batches import Batches, ResidentBatches, Rows, Share, StreamingBatches, load_rows
from invdyn.training.trainer import Trainer
from invdyn.training.worker import Worker
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import create_dataset

BATCH_SIZES = (256, 8192)
PLAIN = "plain tensor"
CPU = torch.device("cpu")


def read_plain(rows: Rows, batch_size: int) -> int:
    """Gather shuffled batches from tensors in memory, one index call each; return how many rows."""
    context, target = rows
    order = torch.randperm(len(context))
    batches = [(context[index], target[index]) for index in order.split(batch_size)[:-1]]
    return len(batches) * batch_size


def read_batches(batches: Batches, batch_size: int) -> int:
    """Go through one epoch of a loader, batch by batch; return how many rows."""
    steps = 0
    for context, target in batches.epoch(0):
        for _ in zip(context, target, strict=True):
            steps += 1
    return steps * batch_size


def train(trainer: Trainer, rows: Rows, steps: int, batch_size: int) -> int:
    """Train on the same rows again and again, which costs no loading; return how many rows."""
    chunk = (rows[0][:batch_size].expand(steps, -1, -1), rows[1][:batch_size].expand(steps, -1, -1))
    noise = trainer.model.draw_noise(steps * batch_size)
    trainer.train_chunk(chunk, tuple(values.unflatten(0, (steps, batch_size)) for values in noise))
    return steps * batch_size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="transitions in the dataset")
    parser.add_argument("--steps", type=int, default=50, help="training steps per round at batch 8192")
    parser.add_argument("--model_config", default=str(ROOT / "configs/inverse_dynamics/pendulum_flow.yaml"))
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-", dir=args.folder) as name:
        source = Path(name) / "sequence/random"
        row_bytes = 8 * STATE_DIM * (1 + 1 / EPISODE_STEPS) + 4 * ACTION_DIM
        make_recording(source, args.rows * row_bytes / 1e9, 8)
        config = DatasetConfig(name="random", buffer_path=str(source), val_ratio=0.0, test_ratio=0.0)
        store = create_dataset(config, local=True)
        recipe = load_model_config(args.model_config)
        model = build_model(recipe, store.state_dim, store.action_dim)
        model.fit_normalization(store.moments)
        rows = load_rows(model, store, "train", CPU)
        for batch_size in BATCH_SIZES:
            share = Share(batch_size)
            resident = ResidentBatches(rows, share, seed=0)
            streaming = StreamingBatches(store, model, share, 0, CPU)
            trainer = Trainer(model, recipe.training, 10**6, Worker(CPU))
            steps = args.steps * max(BATCH_SIZES) // batch_size
            variants: dict[str, Callable[[], int]] = {
                PLAIN: lambda batch_size=batch_size: read_plain(rows, batch_size),  # type: ignore[misc]
                "resident loader": lambda b=resident, n=batch_size: read_batches(b, n),  # type: ignore[misc]
                "streaming loader": lambda b=streaming, n=batch_size: read_batches(b, n),  # type: ignore[misc]
                f"training {recipe.name}": lambda t=trainer, s=steps, n=batch_size: train(t, rows, s, n),  # type: ignore[misc]
            }
            done = {name: run() for name, run in variants.items()}
            per_row = {
                name: [seconds / done[name] for seconds in times]
                for name, times in interleave(variants, args.rounds).items()
            }
            table += [
                {
                    "loader": f"{name}, batch {batch_size}",
                    "batch": batch_size,
                    "rows/s of CPU": 1 / statistics.median(seconds),
                    "x plain tensor": ratio(per_row[PLAIN], seconds),
                    "x training": ratio(list(per_row.values())[-1], seconds),
                }
                for name, seconds in per_row.items()
            ]
    title = f"loaders, {store.num_rows('train'):,} rows of state {STATE_DIM}, action {ACTION_DIM}, one thread, CPU time"
    report("loaders", f"{title}, median of {args.rounds}", table, args.output)


if __name__ == "__main__":
    main()
