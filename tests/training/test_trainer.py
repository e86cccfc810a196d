from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from invdyn.models import FlowInverseDynamics
from invdyn.models.recipe import TrainingRecipe
from invdyn.models.registry import build_model, parse_model_config
from invdyn.training.batches import Rows
from invdyn.training.trainer import Trainer, average_decays, learning_rates
from tests.training.runs import CPU, TWO_STAGES

MLP = {"_target_": "invdyn.models.MLPRegression", "name": "mlp", "down_dims": [16, 16]}


RECIPES = [
    TrainingRecipe(learning_rate=0.5, schedule="cosine", warmup_fraction=0.1),
    TrainingRecipe(learning_rate=0.5, schedule="constant", warmup_fraction=0.1),
    TrainingRecipe(learning_rate=0.5, schedule="constant", warmup_fraction=0.0),
    TrainingRecipe(learning_rate=0.5, schedule="cosine", warmup_fraction=0.0),
]


def test_schedule() -> None:
    cosine, constant, flat, plain = (learning_rates(r, 0, 100, 100).tolist() for r in RECIPES)
    warm = [0.05 * (step + 1) for step in range(10)]
    assert cosine[:10] == constant[:10] == pytest.approx(warm)
    assert constant[10:] == [0.5] * 90
    assert flat == [0.5] * 100
    assert cosine[10] == plain[0] == 0.5
    assert cosine[55] == plain[50] == pytest.approx(0.25)
    assert cosine[10:] == pytest.approx([0.25 * (1 + math.cos(math.pi * k / 90)) for k in range(90)])
    assert 0 < plain[99] < 0.001


def test_schedule_of_the_shortest_runs() -> None:
    assert learning_rates(RECIPES[0], 0, 1, 1) == 0.5
    assert learning_rates(RECIPES[3], 0, 1, 1) == 0.5
    assert learning_rates(TrainingRecipe(learning_rate=0.5), 0, 1, 3) == 0.5


def make_trainer(**recipe: Any) -> Trainer:
    torch.manual_seed(0)
    values = {"learning_rate": 0.01, "schedule": "constant", "warmup_fraction": 0.0, **recipe}
    config = parse_model_config({**MLP, "training": values}, where="test")
    return Trainer(build_model(config, 2, 1), config.training, 40, CPU)


def chunk(trainer: Trainer, steps: int) -> Rows:
    generator = torch.Generator().manual_seed(trainer.step)
    context = torch.randn(steps, 8, trainer.model.context_dim, generator=generator)
    return context, torch.randn(steps, 8, trainer.model.target_dim, generator=generator)


def flat(values: Any) -> torch.Tensor:
    return torch.cat([value.detach().reshape(-1) for value in values]).double()


def test_moving_average_follows_its_closed_form() -> None:
    """average_k = d_k average_{k-1} + (1 - d_k) weights_k with d_k = min(decay, (1 + k) / (10 + k))."""
    trainer = make_trainer(ema_decay=0.5)
    expected = flat(trainer.parameters)
    decays = []
    for step in range(20):
        trainer.train_chunk(chunk(trainer, 1), ())
        decays.append(min(0.5, (1 + step) / (10 + step)))
        expected = decays[-1] * expected + (1 - decays[-1]) * flat(trainer.parameters)
        torch.testing.assert_close(flat(trainer.average.parameters()), expected, rtol=1e-5, atol=1e-7)
    assert decays[0] == 0.1
    assert decays[-1] == 0.5
    assert not torch.equal(flat(trainer.average.parameters()), flat(trainer.parameters))
    assert trainer.step == 20


def test_without_a_moving_average_the_model_is_its_own() -> None:
    trainer = make_trainer(ema_decay=None)
    trainer.train_chunk(chunk(trainer, 2), ())
    assert trainer.average is trainer.model


def test_a_step_is_adamw_at_the_scheduled_rate() -> None:
    """The first step of Adam moves each weight by the learning rate against the sign of its gradient."""
    trainer = make_trainer(learning_rate=0.01, warmup_fraction=0.1)  # 40 steps: a quarter of the rate at first
    before = flat(trainer.parameters)
    losses = trainer.train_chunk(chunk(trainer, 1), ())
    assert losses.shape == (1,)
    moved = (flat(trainer.parameters) - before).abs()
    assert moved[moved > 1e-6].median() == pytest.approx(0.0025, rel=0.01)


def test_a_base_is_trained_first_and_then_fixed_at_its_average() -> None:
    """12 of 40 steps train the mean of the base; then its spread and the flow move, and the mean stays."""
    torch.manual_seed(0)
    config = parse_model_config({**TWO_STAGES, "training": {"base_fraction": 0.3, "weight_decay": 0.1}}, where="test")
    model = build_model(config, 2, 1)
    assert isinstance(model, FlowInverseDynamics)
    assert model.conditional is not None
    trainer = Trainer(model, config.training, 40, CPU)
    base, others = model.conditional.parameters_of_mean(), [model.conditional.log_scale[0].weight, model.network.output]
    start = [flat(base), flat([others[0], others[1].weight])]

    def train(steps: int) -> torch.Tensor:
        rows = chunk(trainer, steps)
        noise = torch.randn(steps, 8, 1), torch.rand(steps, 8, 1)
        return trainer.train_chunk(rows, noise)

    train(11)
    assert not torch.equal(flat(base), start[0])
    assert torch.equal(flat([others[0], others[1].weight]), start[1])
    assert trainer.schedule(1)[0] == learning_rates(config.training, 11, 1, 12)
    assert train(4).shape == (4,)  # across the boundary
    assert trainer.schedule(1)[0] == learning_rates(config.training, 3, 1, 28)
    assert trainer.schedule(1)[1] == average_decays(config.training, 3, 1)
    averaged = flat(trainer.average.conditional.parameters_of_mean())  # type: ignore[union-attr,operator]
    assert torch.equal(flat(base), averaged)
    train(5)
    assert torch.equal(flat(base), averaged)
    assert not torch.equal(flat([others[0], others[1].weight]), start[1])


@pytest.mark.parametrize(("total", "first"), [(40, 36), (3, 2), (1, 0)])
def test_the_flow_of_the_shortest_run_is_trained_too(total: int, first: int) -> None:
    config = parse_model_config({**TWO_STAGES, "training": {"base_fraction": 0.9}}, where="test")
    assert Trainer(build_model(config, 2, 1), config.training, total, CPU).stages == [(0, first), (first, total)]


def test_gradients_are_clipped_to_the_norm() -> None:
    trainer = make_trainer(max_grad_norm=1e-3)
    context, target = chunk(trainer, 1)
    trainer.train_chunk((context, 100 * target), ())
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.model.parameters() if p.grad is not None))
    assert norm == pytest.approx(1e-3, rel=1e-3)
