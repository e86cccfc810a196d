"""Training samples/s at batch 64 against the reference loop: the same network, our default model, and populations."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from measure import add_arguments, interleave, ratio, report
from problem import ROOT, pendulum, tensors
from reference import BATCH_SIZE, ReferenceLoop

from invdyn.models.base import InverseDynamics
from invdyn.models.registry import build_model, load_model_config
from invdyn.training.batches import (
    STEPS_PER_CHUNK,
    PopulationBatches,
    ResidentBatches,
    Rows,
    Share,
    epoch_generator,
    load_rows,
)
from invdyn.training.population import PopulationTrainer
from invdyn.training.trainer import Trainer
from invdyn.training.worker import Worker
from invdyn.transitions.store import TransitionStore

CHUNKS_PER_ROUND = 6
POPULATIONS = (8, 32)
CONFIGS = {"same network": "reference_flow.yaml", "default model": "pendulum_flow.yaml"}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        run: trains one round.
        steps: of a round, each of all models.
        models: trained at once.
        parameters: of one model.
    """

    run: Callable[[], object]
    steps: int
    models: int
    parameters: int

    @property
    def samples(self) -> int:
        """Rows of a round, over all models."""
        return self.steps * self.models * BATCH_SIZE


def reference_variant(store: TransitionStore, device: torch.device, chunks: int | None = None) -> Variant:
    """Return the reference loop."""
    chunks = chunks or CHUNKS_PER_ROUND
    torch.manual_seed(0)
    loop = ReferenceLoop(*tensors(store, "train"), device)
    steps = chunks * STEPS_PER_CHUNK
    return Variant(lambda: loop.train(steps), steps, 1, _count(loop.network))


def solo_variant(
    store: TransitionStore,
    config_name: str,
    device: torch.device,
    *,
    compiled: bool,
    precision: torch.dtype = torch.float32,
    chunks: int | None = None,
) -> Variant:
    """Return the training of one model of a config at batch 64, as many steps in each of its stages."""
    chunks = chunks or CHUNKS_PER_ROUND
    trainers = _one_per_stage(partial(_trainer, store, config_name, device, 0, compiled, precision))
    rows = load_rows(trainers[0].model, store, "train", device)
    stream = _whole_chunks(ResidentBatches(rows, Share(BATCH_SIZE), seed=0).epoch)
    generator = epoch_generator(0, 0, device=device)

    def run() -> None:
        for trainer in trainers * chunks:
            noise = trainer.model.draw_noise(STEPS_PER_CHUNK * BATCH_SIZE, generator, device)
            trainer.train_chunk(next(stream), tuple(n.unflatten(0, (STEPS_PER_CHUNK, BATCH_SIZE)) for n in noise))

    return Variant(run, len(trainers) * chunks * STEPS_PER_CHUNK, 1, _count(trainers[0].model))


def population_variant(
    store: TransitionStore,
    config_name: str,
    device: torch.device,
    size: int,
    *,
    compiled: bool = True,
    precision: torch.dtype = torch.float32,
    chunks: int = 1,
) -> Variant:
    """Return the training of `size` models of a config at once, each with seed, order and noise of its own."""
    make = partial(_trainer, store, config_name, device, compiled=False, precision=precision)
    members = [_one_per_stage(partial(make, seed)) for seed in range(size)]
    populations = [PopulationTrainer(trainers, compiled) for trainers in zip(*members, strict=True)]
    model = members[0][0].model
    rows = load_rows(model, store, "train", device)
    stream = _whole_chunks(PopulationBatches(rows, BATCH_SIZE, range(size)).epoch)
    generators = [epoch_generator(seed, 0, device=device) for seed in range(size)]

    def run() -> None:
        for population in populations * chunks:
            noise = population.draw_noise(generators, STEPS_PER_CHUNK, BATCH_SIZE)
            population.train_chunk(next(stream), noise)

    return Variant(run, len(populations) * chunks * STEPS_PER_CHUNK, size, _count(model))


def _one_per_stage(make: Callable[[], Trainer]) -> list[Trainer]:
    """Return a trainer at the first step of each stage of training; the stages must have equal shares of the steps."""
    trainers = [make() for _ in make().stages]
    for trainer, (begin, end) in zip(trainers, trainers[0].stages, strict=True):
        assert (end - begin) * len(trainers) == trainer.total_steps
        trainer.step = begin
        trainer.enter_stage()
    return trainers


def _trainer(
    store: TransitionStore, config_name: str, device: torch.device, seed: int, compiled: bool, precision: torch.dtype
) -> Trainer:
    config = load_model_config(ROOT / "configs" / "inverse_dynamics" / config_name)
    torch.manual_seed(seed)
    model = build_model(config, store.state_dim, store.action_dim)
    model.fit_normalization(store.moments)
    return Trainer(model.to(device), config.training, 10**6, Worker(device), compiled, precision)


def _whole_chunks(epoch: Callable[[int], Iterator[Rows]]) -> Iterator[Rows]:
    """Yield the chunks of one epoch after another that have all their steps."""
    number = 0
    while True:
        whole = False
        for rows in epoch(number):
            if len(rows[0]) == STEPS_PER_CHUNK:
                whole = True
                yield rows
        assert whole, "a shorter epoch would be counted as a whole round"
        number += 1


def _count(model: torch.nn.Module | InverseDynamics) -> int:
    return sum(p.numel() for p in model.parameters())


def variants(
    store: TransitionStore, device: torch.device, populations: tuple[int, ...], *, compiled: bool
) -> dict[str, Callable[[], Variant]]:
    """Return what makes the reference loop and ours, eager and (where there is a compiler) compiled."""
    found: dict[str, Callable[[], Variant]] = {"reference loop": partial(reference_variant, store, device)}
    for name, config in CONFIGS.items():
        found[f"{name}, eager"] = partial(solo_variant, store, config, device, compiled=False)
        if compiled:
            found[f"{name}, compiled"] = partial(solo_variant, store, config, device, compiled=True)
    if compiled:
        for name, config in CONFIGS.items():
            for size in populations:
                found[f"{name}, population of {size}"] = partial(population_variant, store, config, device, size)
    return found


def table(found: dict[str, Variant], times: dict[str, list[float]], unit: str) -> list[dict[str, object]]:
    """Return a row per variant: samples/s by its median round, and the median of its ratios to the reference."""
    reference = found["reference loop"]
    return [
        {
            "loop": name,
            "parameters": variant.parameters,
            unit: variant.samples / sorted(times[name])[len(times[name]) // 2],
            "x reference": variant.samples / reference.samples * ratio(times["reference loop"], times[name]),
        }
        for name, variant in found.items()
    ]


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
        makers = variants(store, torch.device("cpu"), POPULATIONS, compiled=not args.no_compile)
        found = {name: make() for name, make in makers.items()}
        times = interleave({name: variant.run for name, variant in found.items()}, args.rounds)
    title = f"training at batch {BATCH_SIZE}, one thread, median of {args.rounds} interleaved rounds"
    report("training", title, table(found, times, "samples/s of CPU"), args.output)


if __name__ == "__main__":
    main()
