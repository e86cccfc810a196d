"""Training samples/s at batch 64: the same network in our loop, and our default model, against the reference loop."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
from measure import add_arguments, interleave, ratio, report
from problem import ROOT, pendulum, tensors
from reference import BATCH_SIZE, ReferenceLoop

from invdyn.models.registry import build_model, load_model_config
from invdyn.training.batches import STEPS_PER_CHUNK, ResidentBatches, Share, load_rows
from invdyn.training.trainer import Trainer
from invdyn.training.worker import Worker
from invdyn.transitions.store import TransitionStore

CHUNKS_PER_ROUND = 6
STEPS_PER_ROUND = STEPS_PER_CHUNK * CHUNKS_PER_ROUND


def ours(store: TransitionStore, config_name: str, compiled: bool) -> tuple[Callable[[], object], int]:
    """Return a function that trains one round of a model config at batch 64, and the model's parameters."""
    config = load_model_config(ROOT / "configs" / "inverse_dynamics" / config_name)
    worker = Worker(torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config, store.state_dim, store.action_dim)
    model.fit_normalization(store.moments)
    batches = ResidentBatches(load_rows(model, store, "train", worker.device), Share(BATCH_SIZE), seed=0)
    trainer = Trainer(model, config.training, 10**6, worker, compiled)
    chunks = iter(())

    def train_round() -> None:
        nonlocal chunks
        for _ in range(CHUNKS_PER_ROUND):
            rows = next(chunks, None)
            if rows is None or len(rows[0]) < STEPS_PER_CHUNK:
                chunks = batches.epoch(trainer.step)
                rows = next(chunks)
                assert len(rows[0]) == STEPS_PER_CHUNK, "a shorter epoch would be counted as a whole round"
            noise = model.draw_noise(rows[0].shape[0] * BATCH_SIZE)
            trainer.train_chunk(rows, tuple(n.unflatten(0, rows[0].shape[:2]) for n in noise))

    return train_round, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--episodes", type=int, help="episodes to record (default: the dataset config's)")
    parser.add_argument("--no_compile", action="store_true", help="leave out the variants that need a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as folder:
        store = pendulum(folder, args.episodes)
        torch.manual_seed(0)
        reference = ReferenceLoop(*tensors(store, "train"))
        parameters = {"reference loop": sum(p.numel() for p in reference.network.parameters())}
        variants: dict[str, Callable[[], object]] = {"reference loop": lambda: reference.train(STEPS_PER_ROUND)}
        for name, config, compiled in (
            ("same network, eager", "reference_flow.yaml", False),
            ("same network, compiled", "reference_flow.yaml", True),
            ("default model, eager", "pendulum_flow.yaml", False),
            ("default model, compiled", "pendulum_flow.yaml", True),
        ):
            if not (compiled and args.no_compile):
                variants[name], parameters[name] = ours(store, config, compiled)
        times = interleave(variants, args.rounds)
    rows = [
        {
            "loop": name,
            "parameters": parameters[name],
            "samples/s of CPU": STEPS_PER_ROUND * BATCH_SIZE / sorted(seconds)[len(seconds) // 2],
            "x reference": ratio(times["reference loop"], seconds),
        }
        for name, seconds in times.items()
    ]
    title = f"training at batch {BATCH_SIZE}, one thread, median of {args.rounds} interleaved rounds"
    report("training", title, rows, args.output)


if __name__ == "__main__":
    main()
