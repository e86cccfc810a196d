from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdyn.errors import ConfigError
from invdyn.models.base import InverseDynamics
from invdyn.models.registry import build_model, load_model_config
from invdyn.training.checkpoint import load_model, save_checkpoint
from invdyn.training.compiled import CompiledStep, require_compiler
from invdyn.training.run_config import RunConfig
from invdyn.training.trainer import Trainer
from invdyn.transitions.store import TransitionStore
from tests.training.runs import CPU, FLOW, TWO_STAGES, assert_same_values, run_config

pytestmark = pytest.mark.usefixtures("without_shape_checks")

CPU_DEVICE = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs/inverse_dynamics"
WITHOUT_STEPS = ("oracle", "linear", "nearest_neighbours", "trees")
BATCH, STEPS = 16, 20
TOLERANCE = 1e-6
MLP = {**FLOW, "down_dims": [8, 8]}
UNET = {**MLP, "network": "unet", "prediction": "velocity", "down_dims": [4]}
PLAIN = {"ema_decay": None, "schedule": "constant", "warmup_fraction": 0.0}
# The norm lies amid those of the gradients here: some are clipped, some are not.
EVERYTHING = {"ema_decay": 0.99, "weight_decay": 0.1, "max_grad_norm": 0.5}


def compiler_is_there() -> bool:
    try:
        require_compiler(CPU_DEVICE)
    except ConfigError:
        return False
    return True


compiles = pytest.mark.skipif(not compiler_is_there(), reason="needs a C++ compiler")


def make_trainer(config: RunConfig, store: TransitionStore, *, compiled: bool) -> Trainer:
    torch.manual_seed(config.training.seed)
    model = build_model(config.model, store.state_dim, store.action_dim)
    model.fit_normalization(store.moments)
    return Trainer(model, config.training, 3 * STEPS // 2, CPU, compiled)  # a second stage starts within a chunk


def chunk(
    model: InverseDynamics, store: TransitionStore, first: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return rows and noise of STEPS batches from the number `first` on."""
    columns = store.load("train", columns=("state", "action", "next_state"))
    rows = {name: torch.from_numpy(values[first * BATCH :][: STEPS * BATCH]) for name, values in columns.items()}
    encoded = model.encode(rows["state"], rows["action"], rows["next_state"])
    noise = model.draw_noise(STEPS * BATCH, torch.Generator().manual_seed(first))
    batched = [tuple(t.unflatten(0, (STEPS, BATCH)) for t in tensors) for tensors in (encoded, noise)]
    return batched[0], batched[1]


def train(trainer: Trainer, store: TransitionStore, first: int = 0) -> Tensor:
    return trainer.train_chunk(*chunk(trainer.model, store, first))


def vectors(trainer: Trainer) -> dict[str, Tensor]:
    """Return all that a step changes, as flat vectors."""
    states = [trainer.optimizer.state[parameter] for parameter in trainer.parameters]
    return {
        "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
        "average": torch.cat([p.detach().flatten() for p in trainer.average.parameters()]),
        "exp_avg": torch.cat([state["exp_avg"].flatten() for state in states]),
        "exp_avg_sq": torch.cat([state["exp_avg_sq"].flatten() for state in states]),
        "step": torch.stack([state["step"] for state in states]),
    }


def assert_close(found: Trainer, expected: Trainer) -> None:
    ours, theirs = vectors(found), vectors(expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert (found.step, found.optimizer.param_groups[0]["lr"]) == (
        expected.step,
        expected.optimizer.param_groups[0]["lr"],
    )


@compiles
def test_rows_in_any_layout(store: TransitionStore, tmp_path: Path) -> None:
    """Rows that are gathered keep the layout of their index, whose strides follow from the number of steps."""
    trainers = [make_trainer(run_config(store, tmp_path, MLP), store, compiled=True) for _ in range(2)]
    for first in (0, STEPS):
        rows, noise = chunk(trainers[0].model, store, first)
        trainers[0].train_chunk(rows, noise)
        turned = [tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in each) for each in (rows, noise)]
        trainers[1].train_chunk(*((rows, noise) if first == 0 else turned))
    assert_close(*trainers)


@compiles
@pytest.mark.parametrize(
    ("model", "recipe"),
    [(TWO_STAGES, EVERYTHING), (MLP, PLAIN), pytest.param(UNET, EVERYTHING, marks=pytest.mark.slow)],
    ids=["two stages", "plain Adam", "unet"],
)
def test_it_equals_the_eager_step(
    store: TransitionStore, tmp_path: Path, model: dict[str, Any], recipe: dict[str, Any]
) -> None:
    config = run_config(store, tmp_path, model, batch_size=BATCH, **recipe)
    eager, compiled = (make_trainer(config, store, compiled=flag) for flag in (False, True))
    start = [parameter.detach().clone() for parameter in eager.model.parameters()]
    losses = train(eager, store)
    torch.testing.assert_close(train(compiled, store), losses, atol=TOLERANCE, rtol=TOLERANCE)
    assert_close(compiled, eager)
    moved = [(p - old).abs().max().item() for p, old in zip(eager.model.parameters(), start, strict=True)]
    assert max(moved) > 1000 * TOLERANCE


@compiles
def test_checkpoints_of_compiled_and_eager_training_are_interchangeable(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path, MLP, batch_size=BATCH, **EVERYTHING)
    whole = make_trainer(config, store, compiled=False)
    train(whole, store)
    train(whole, store, STEPS)
    for first, second in ((True, False), (False, True), (True, True)):
        run = config.replace(run_dir=str(tmp_path / f"{first}-{second}"))
        before = make_trainer(run, store, compiled=first)
        train(before, store)
        folder = save_checkpoint(run.run_dir, run, before.step, before.average.state_dict(), before.state(1), {})
        after = make_trainer(run, store, compiled=second)
        assert after.restore(run) == 1
        assert_same_values(after.state(1)["weights"], before.state(1)["weights"])
        train(after, store, STEPS)
        assert_close(after, whole)
        saved, average = load_model(folder).state_dict(), before.average.state_dict()
        assert_same_values(dict(saved), dict(average))


OTHERS = {
    "other recipe": [(MLP, EVERYTHING), (MLP, PLAIN)],
    "other constants and shapes": [
        (MLP, EVERYTHING),
        (MLP, {**EVERYTHING, "max_grad_norm": 10.0}),
        ({**MLP, "down_dims": [6, 10]}, EVERYTHING),
    ],
}


@compiles
@pytest.mark.parametrize(
    "runs", [OTHERS["other recipe"], pytest.param(OTHERS["other constants and shapes"], marks=pytest.mark.slow)]
)
def test_models_in_one_process_do_not_share_a_graph(
    store: TransitionStore, tmp_path: Path, runs: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    """Guards are left out: without care, the second model would be trained by the graph of the first."""
    configs = [run_config(store, tmp_path, model, batch_size=BATCH, **recipe) for model, recipe in runs]
    compiled = [make_trainer(config, store, compiled=True) for config in configs]
    for _ in range(2):
        for trainer in compiled:
            train(trainer, store)
    for trainer, config in zip(compiled, configs, strict=True):
        eager = make_trainer(config, store, compiled=False)
        train(eager, store)
        train(eager, store)
        assert_close(trainer, eager)


ONE_GRAPH = """
import sys
import torch
from invdyn.models.registry import load_model_config
for path in sys.argv[1:]:
    model = load_model_config(path).build(4, 1, 0, 1)
    batch = torch.randn(8, model.context_dim), torch.rand(8, model.target_dim), model.draw_noise(8)
    loss = torch.compile(model.encoded_loss, backend="eager", fullgraph=True)(*batch)
    torch.testing.assert_close(loss, model.encoded_loss(*batch))
    torch._dynamo.reset()
"""


def test_every_model_of_the_repository_is_one_graph() -> None:
    """Long runs are compiled unasked. In a process of its own: what checks shapes in this one can break a graph."""
    paths = sorted(str(path) for path in CONFIGS.glob("*.yaml") if path.stem not in WITHOUT_STEPS)
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_of_the_repository_can_be_one_of_many(path: Path) -> None:
    if path.stem in WITHOUT_STEPS:
        pytest.skip("nothing to train")
    config = load_model_config(path)
    models = [config.build(4, 1, 0, 1) for _ in range(2)]
    noise = models[0].draw_noise(8)
    context, target = torch.randn(8, models[0].context_dim), torch.rand(8, models[0].target_dim)
    trainers = [Trainer(model, config.training, 10, CPU) for model in models]
    expected = [model.stage_loss(context, target, noise).item() for model in models]
    step = CompiledStep([trainer.member() for trainer in trainers], None, compiled=False)
    rates, decays = map(np.stack, zip(*(trainer.schedule(1) for trainer in trainers), strict=True))
    chunk = tuple(torch.stack([each, each])[None] for each in (context, target, *noise))
    assert step(step.coefficients(rates, decays), chunk)[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_coefficients_are_the_bias_corrections_of_adamw() -> None:
    """One weight and a constant gradient: a step of AdamW is then a known function of the coefficients."""
    beta_1, beta_2, rate, gradient = 0.9, 0.999, 0.01, 0.3
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=rate, betas=(beta_1, beta_2), eps=0.0, weight_decay=0.0)
    step = object.__new__(CompiledStep)
    step.groups, step.flat, step.num_members, step.done = [optimizer.param_groups[0]], torch.zeros(1), 1, [0]
    coefficients = step.coefficients(np.full((1, 5), rate), np.full((1, 5), 0.5)).double()
    step.done = [5]
    torch.testing.assert_close(
        step.coefficients(np.array([[rate]]), np.array([[0.5]]))[0, 0].item(), rate / (1 - beta_1**6)
    )
    first, second = 0.0, 0.0
    for step_size, sqrt_correction_2, kept, decay in coefficients:
        before = weight.item()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        first, second = beta_1 * first + (1 - beta_1) * gradient, beta_2 * second + (1 - beta_2) * gradient**2
        moved = step_size * first / (second**0.5 / sqrt_correction_2)
        assert before - weight.item() == pytest.approx(moved.item(), rel=1e-5)
        assert (kept, decay) == (1.0, 0.5)


@compiles
def test_weights_and_optimizer_stay_views_of_one_vector(store: TransitionStore, tmp_path: Path) -> None:
    """Without views, checkpoints would hold what the weights were before the first compiled step."""
    trainer = make_trainer(run_config(store, tmp_path, MLP, batch_size=BATCH), store, compiled=True)
    before = copy.deepcopy(trainer.model.state_dict())
    train(trainer, store)
    graph = trainer.one_graph
    assert graph is not None
    torch.testing.assert_close(vectors(trainer)["weights"], graph.flat, atol=0, rtol=0)
    torch.testing.assert_close(vectors(trainer)["exp_avg"], graph.exp_avg, atol=0, rtol=0)
    changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [name for name, _ in trainer.model.named_parameters()]


def test_without_a_compiler(store: TransitionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    trainer = make_trainer(run_config(store, tmp_path, MLP, batch_size=BATCH), store, compiled=True)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler: .*no-such-compiler not found; install it"):
        train(trainer, store)
