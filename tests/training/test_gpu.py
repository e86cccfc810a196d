"""What only a CUDA device can show: `pytest -m gpu`. The same steps as eager ones, and no wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from invdyn.models.registry import build_model
from invdyn.training.batches import PopulationBatches, ResidentBatches, Rows, Share, epoch_generator, load_rows
from invdyn.training.export import export_model
from invdyn.training.loop import NOISE_STREAM, make_trainer
from invdyn.training.population import PopulationTrainer
from invdyn.training.run_config import RunConfig
from invdyn.training.trainer import Trainer
from invdyn.training.worker import Worker
from invdyn.transitions.store import TransitionStore
from tests.training.runs import FLOW, run_config
from tests.training.test_compiled import vectors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
BATCH, EPOCHS = 16, 4
RECIPE = {"batch_size": BATCH, "ema_decay": 0.99, "weight_decay": 0.1, "max_grad_norm": 0.5, "num_epochs": EPOCHS}
TOLERANCE = 1e-4
U_NET_TOLERANCE = 2e-3  # of weights: one step moves them by up to 1e-2, and rounding grows from step to step


@pytest.fixture(autouse=True)
def _plain_products(without_shape_checks: None) -> None:
    """Products in full float32."""
    torch.backends.cuda.matmul.allow_tf32 = False


def trainer_of(config: RunConfig, store: TransitionStore, *, compiled: bool) -> Trainer:
    torch.manual_seed(config.training.seed)
    model = build_model(config.model, store.state_dim, store.action_dim)
    model.fit_normalization(store.moments)
    steps = EPOCHS * (store.num_rows("train") // BATCH)
    return make_trainer(model.to(CUDA), config.replace(compile=compiled), Worker(CUDA, echo=False), steps)


def chunks(trainer: Trainer, store: TransitionStore, seed: int) -> Iterator[tuple[Rows, tuple[Tensor, ...]]]:
    """Yield rows and noise of all epochs, whole chunks and the shorter ones that end an epoch."""
    share = Share(BATCH)
    batches = ResidentBatches(load_rows(trainer.model, store, "train", CUDA), share, seed)
    for epoch in range(EPOCHS):
        generator = epoch_generator(seed, epoch, NOISE_STREAM, CUDA)
        for rows in batches.epoch(epoch):
            drawn = trainer.model.draw_noise(len(rows[0]) * BATCH, generator, CUDA)
            yield rows, tuple(share.of(noise) for noise in drawn)


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_captured_steps_equal_eager_ones(store: TransitionStore, tmp_path: Path, network: str) -> None:
    config = run_config(store, tmp_path, {**FLOW, "network": network}, **RECIPE)
    eager, compiled = (trainer_of(config, store, compiled=flag) for flag in (False, True))
    losses: list[list[Tensor]] = [[], []]
    for found, trainer in zip(losses, (eager, compiled), strict=True):
        found += [trainer.train_chunk(rows, noise) for rows, noise in chunks(trainer, store, config.training.seed)]
    torch.testing.assert_close(torch.cat(losses[1]), torch.cat(losses[0]), atol=TOLERANCE, rtol=1e-3)
    tolerance = U_NET_TOLERANCE if network == "unet" else TOLERANCE
    for name, expected in vectors(eager).items():
        torch.testing.assert_close(vectors(compiled)[name], expected, atol=tolerance, rtol=1e-3)
    assert compiled.one_graph is not None
    assert any(compiled.one_graph.captured.values()), "no chunk was taken as one CUDA graph"


@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits_for_the_device(store: TransitionStore, tmp_path: Path, compiled: bool) -> None:
    trainer = trainer_of(run_config(store, tmp_path, **RECIPE, learning_rate=1e-3), store, compiled=compiled)
    prepared = list(chunks(trainer, store, 0))
    whole = [each for each in prepared if len(each[0][0]) == len(prepared[0][0][0])]
    for rows, noise in whole[:3]:  # compiled, captured, replayed
        trainer.train_chunk(rows, noise)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = trainer.train_chunk(*whole[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses).all()


def test_a_population_equals_its_members(store: TransitionStore, tmp_path: Path) -> None:
    configs = [run_config(store, tmp_path / str(i), **RECIPE, seed=i, learning_rate=10.0**-i / 100) for i in range(3)]
    trainers = [trainer_of(config, store, compiled=False) for config in configs]
    population = PopulationTrainer(trainers, compiled=True)
    batches = PopulationBatches(load_rows(trainers[0].model, store, "train", CUDA), BATCH, range(3))
    for epoch in range(EPOCHS):
        generators = [epoch_generator(seed, epoch, NOISE_STREAM, CUDA) for seed in range(3)]
        for rows in batches.epoch(epoch):
            population.train_chunk(rows, population.draw_noise(generators, len(rows[0]), BATCH))
    for config, found in zip(configs, trainers, strict=True):
        alone = trainer_of(config, store, compiled=False)
        for rows, noise in chunks(alone, store, config.training.seed):
            alone.train_chunk(rows, noise)
        for name, expected in vectors(alone).items():
            torch.testing.assert_close(vectors(found)[name], expected, atol=TOLERANCE, rtol=1e-3)


def test_machine_code_for_the_device(store: TransitionStore, tmp_path: Path) -> None:
    model: Any = trainer_of(run_config(store, tmp_path, **RECIPE), store, compiled=False).model.eval()
    program = torch._inductor.aoti_load_package(str(export_model(model, tmp_path / "a.pt2", "aoti")))
    for batch in (1, 7, 1000):
        state, after = torch.randn(2, batch, store.state_dim, device=CUDA)
        noise = torch.randn(2, batch, model.noise_dim, device=CUDA)
        torch.testing.assert_close(
            program(state, after, noise), model.sample_from(state, after, noise), rtol=1e-3, atol=1e-4
        )
