"""The reference loop is what the figures are ratios to: it must be the recipe, and our copy of its network the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from invdyn.models.flow import FlowInverseDynamics
from invdyn.models.registry import load_model_config
from tests.benchmarks.conftest import Load

STATE_DIM, ACTION_DIM, ROWS = 4, 1, 37
RENAMED = {
    "time.0.frequency": "frequencies",
    "time.": "time_embedding.",
    "condition.": "context_embedding.",
    "enter.": "input.",
    "leave.": "output.",
}


@pytest.fixture
def reference(load: Load) -> ModuleType:
    torch.manual_seed(0)
    return load("reference")


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state, next_state = torch.randn(2, ROWS, STATE_DIM, generator=generator)
    return state, torch.randn(ROWS, ACTION_DIM, generator=generator), next_state


def with_weights_of(network: nn.Module, repository: Path) -> FlowInverseDynamics:
    """Return the model of reference_flow.yaml with the weights of the reference network."""
    config = load_model_config(repository / "configs/inverse_dynamics/reference_flow.yaml")
    model = config.build(STATE_DIM, ACTION_DIM, 0, 1)
    assert isinstance(model, FlowInverseDynamics)
    weights = {}
    levels: dict[str, list[Tensor]] = {"projection.weight": [], "projection.bias": []}
    for name, value in network.state_dict().items():
        if name.startswith("projections."):
            levels[f"projection.{name.rpartition('.')[2]}"].append(value)
            continue
        ours = next((new + name.removeprefix(old) for old, new in RENAMED.items() if name.startswith(old)), name)
        prefix, _, rest = ours.partition(".")
        if prefix == "time_embedding":  # the Fourier features are a layer of their own there
            number, _, parameter = rest.partition(".")
            ours = f"{prefix}.{int(number) - 1}.{parameter}"
        weights[ours] = value
    model.network.load_state_dict(weights | {name: torch.cat(values) for name, values in levels.items()})
    return model


def test_it_has_the_parameters_of_the_recipe(reference: ModuleType, repository: Path) -> None:
    network = reference.ReferenceNetwork(ACTION_DIM, 2 * STATE_DIM)
    assert sum(parameter.numel() for parameter in network.parameters()) == 43_609
    ours = with_weights_of(network, repository)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 43_609


def test_our_network_is_the_same_function(
    reference: ModuleType, repository: Path, rows: tuple[Tensor, Tensor, Tensor]
) -> None:
    network = reference.ReferenceNetwork(ACTION_DIM, 2 * STATE_DIM)
    state, action, next_state = rows
    x, t, condition = action, torch.rand(ROWS, 1), torch.cat([state, next_state], dim=1)
    found = with_weights_of(network, repository).network(x, t, condition)
    torch.testing.assert_close(found, network(x, t, condition), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


def test_our_model_samples_and_learns_the_same(
    reference: ModuleType, repository: Path, rows: tuple[Tensor, Tensor, Tensor]
) -> None:
    """100 Euler steps on raw states from the same noise; and the loss whose gradient the loop follows."""
    loop = reference.ReferenceLoop(*rows)
    model = with_weights_of(loop.network, repository)
    state, action, next_state = rows
    torch.manual_seed(3)
    expected = loop.sample(state, next_state)
    torch.manual_seed(3)
    torch.testing.assert_close(model.sample(state, next_state)[0], expected, rtol=1e-3, atol=1e-4)
    torch.manual_seed(3)
    few = loop.sample(state, next_state, 4)
    assert (few - expected).abs().max() > 1e-3
    x_0, t = torch.randn(ROWS, ACTION_DIM), torch.rand(ROWS, 1)
    velocity = loop.network((1 - t) * x_0 + t * action, t, torch.cat([state, next_state], dim=1))
    found = model.encoded_loss(*model.encode(state, action, next_state), (x_0, t))
    torch.testing.assert_close(found, (velocity - (action - x_0)).square().mean(), rtol=1e-4, atol=1e-5)


def test_the_loop_learns(reference: ModuleType) -> None:
    """From the raw rows to actions: s' = s + a, of which each batch is another 64 rows."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(2048, 1, generator=generator)
    action = torch.rand(2048, 1, generator=generator) * 2 - 1
    loop = reference.ReferenceLoop(state, action, state + action)
    assert loop.loader.batch_size == 64
    assert loop.optimizer.defaults["lr"] == 1e-3
    loop.train(300)
    error = (loop.sample(state, state + action, 10) - action).square().mean().sqrt()
    assert error < 0.5 * action.std()
