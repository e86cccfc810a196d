from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from invdyn.errors import ConfigError
from invdyn.models import FlowInverseDynamics
from invdyn.models.density import field_and_divergence, flow_log_prob
from invdyn.models.flow import SamplingSetting
from tests.models.rows import make_rows, moments_of

MEAN, STD = torch.tensor([0.7, -1.0]).double(), torch.tensor([0.5, 2.0]).double()


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[x_1 - x_0 | x_t = x] for x_0 ~ N(0, I) and x_1 ~ N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


@pytest.mark.parametrize("angular", [True, False])
def test_the_flow_of_a_gaussian_has_its_density(angular: bool) -> None:
    x = MEAN + 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    found = flow_log_prob(gaussian_velocity, x, angular=angular)
    torch.testing.assert_close(found, Normal(MEAN, STD).log_prob(x).sum(dim=1), rtol=0, atol=1e-4)


def test_the_divergence_is_the_trace_of_the_jacobian() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 3).double()
    x = torch.randn(5, 3).double()
    value, divergence = field_and_divergence(lambda y, s: (y @ matrix.T).sin() * s, x, 2.0)
    torch.testing.assert_close(value, (x @ matrix.T).sin() * 2.0)
    torch.testing.assert_close(divergence, 2.0 * ((x @ matrix.T).cos() * matrix.diagonal()).sum(dim=1))


def silenced(model: FlowInverseDynamics) -> FlowInverseDynamics:
    """With a last layer of zeros an angular flow is N(0, I), a velocity flow too."""
    torch.nn.init.zeros_(model.network.output.weight)  # type: ignore[union-attr,arg-type]
    torch.nn.init.zeros_(model.network.output.bias)  # type: ignore[union-attr,arg-type]
    return model


@pytest.mark.parametrize("network", ["mlp", "film"])
@pytest.mark.parametrize("prediction", ["velocity", "angular"])
def test_a_flow_that_does_nothing_is_the_gaussian_of_its_base(network: str, prediction: str) -> None:
    rows = make_rows()
    torch.manual_seed(0)
    model = silenced(FlowInverseDynamics(3, 2, 4, (8, 8), network=network, prediction=prediction))  # type: ignore[arg-type]
    model.fit_normalization(moments_of(rows))
    mean = model.encode_transition(rows.state, rows.next_state)[1]
    factor = model.target_scale.double()
    expected = MultivariateNormal(mean, covariance_matrix=factor @ factor.T).log_prob(rows.action.double())
    torch.testing.assert_close(model.log_prob(*rows), expected, rtol=1e-5, atol=1e-5)


def test_the_calibrated_spread_of_the_finest_setting_is_in_the_density() -> None:
    rows = make_rows()
    torch.manual_seed(0)
    options = {"network": "mlp", "prediction": "angular", "base": "mlp", "base_dims": (8, 8)}
    model = silenced(FlowInverseDynamics(3, 2, 4, (8, 8), **options))  # type: ignore[arg-type]
    model.fit_normalization(moments_of(rows))
    model.spreads = {SamplingSetting("euler", 1): (5.0, 5.0), SamplingSetting("angular_euler", 2): (0.5, 3.0)}
    samples = model.sample(rows.state, rows.next_state, 20_000, num_inference_steps=2, solver="angular_euler").double()
    context, base = model.encode_transition(rows.state, rows.next_state)
    _, found = model.condition(context)
    assert found is not None
    mean = base + found.mean.double() @ model.target_scale.double().T
    spread = found.log_scale.double().exp() * torch.tensor([0.5, 3.0])
    factor = model.target_scale.double() * spread[:, None]
    gaussian = MultivariateNormal(mean, covariance_matrix=factor @ factor.mT)
    torch.testing.assert_close(samples.mean(dim=0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(_covariances(samples), gaussian.covariance_matrix, rtol=0.06, atol=0.01)
    torch.testing.assert_close(model.log_prob(*rows), gaussian.log_prob(rows.action.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tails", "spread"), [(None, 1.0), (2.0, 1.0), (2.0, 1.7)])
def test_the_density_on_a_base_is_that_of_the_samples(tails: float | None, spread: float) -> None:
    torch.manual_seed(1)
    options = {"network": "mlp", "prediction": "angular", "base": "mlp", "base_dims": (8, 8), "base_tails": tails}
    model = FlowInverseDynamics(3, 1, 4, (8, 8), **options)  # type: ignore[arg-type]
    # What is stretched is the distance from one mean only where the first evaluation says the same of all noise.
    torch.nn.init.normal_(model.network.output.weight, std=float(spread == 1.0))  # type: ignore[union-attr,arg-type]
    torch.nn.init.constant_(model.network.output.bias, 0.7)  # type: ignore[union-attr,arg-type]
    model.spreads = {SamplingSetting("angular_midpoint", 50): (spread,)}
    rows = make_rows(rows=1)
    edges = torch.linspace(-20.0, 20.0, 2001).double()
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    states = rows.state.expand(2000, -1), rows.next_state.expand(2000, -1)
    mass = model.log_prob(states[0], middle, states[1]).exp() * (edges[1] - edges[0])
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-3)
    drawn = model.sample(rows.state, rows.next_state, 20_000, num_inference_steps=50, solver="angular_midpoint")
    share = torch.searchsorted(drawn.flatten().double().sort().values, edges[1:]) / 20_000
    torch.testing.assert_close(mass.cumsum(0), share.double(), rtol=0, atol=0.02)


def test_a_steep_network_does_not_explode_where_it_was_not_trained() -> None:
    """Its field beyond the noise and targets of training would carry an action back to noise 1e100 away."""
    torch.manual_seed(0)
    options = {"network": "mlp", "prediction": "angular", "base": "mlp", "base_dims": (8, 8), "base_tails": 3.0}
    model = FlowInverseDynamics(3, 2, 4, (8, 8), **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.network.output.weight, std=100.0)  # type: ignore[union-attr,arg-type]
    rows = make_rows()
    assert model.log_prob(*rows).min() > -1e4


def _covariances(samples: Tensor) -> Tensor:
    centred = samples - samples.mean(dim=0)
    return torch.einsum("sbi,sbj->bij", centred, centred) / len(samples)


@pytest.mark.parametrize("rule", ["reflect", "clip"])
def test_the_density_inside_bounds_is_that_of_the_samples(rule: str) -> None:
    """Reflected, it integrates to 1 over the interval; clipped, to the share of samples strictly inside."""
    rows = make_rows(action_dim=1)
    torch.manual_seed(0)
    options = {"network": "mlp", "prediction": "angular", "base": "none", "at_bounds": rule}
    model = FlowInverseDynamics(3, 1, 4, (8, 8), action_bounds=(-1.2, 1.5), **options)  # type: ignore[arg-type]
    model.fit_normalization(moments_of(rows))
    state, next_state = rows.state[:1], rows.next_state[:1]
    width = 2.7 / 200
    grid = -1.2 + width * (torch.arange(200) + 0.5)[:, None]
    mass = model.log_prob(state.expand(200, -1), grid, next_state.expand(200, -1)).exp().sum().item() * width
    sampled = model.sample(state, next_state, 20_000, num_inference_steps=50, solver="midpoint")
    assert sampled.min() >= -1.2
    assert sampled.max() <= 1.5
    inside = ((sampled > -1.2) & (sampled < 1.5)).float().mean().item()
    assert mass == pytest.approx(inside, abs=0.02)
    assert (mass > 0.97) == (rule == "reflect")
    outside = model.log_prob(state, torch.tensor([[1.6]]), next_state)
    assert outside.item() == -torch.inf


def test_where_there_is_no_density() -> None:
    rows = make_rows()
    with pytest.raises(ConfigError, match="log_prob needs prediction velocity or angular"):
        FlowInverseDynamics(3, 2, 4, (8,), prediction="target").log_prob(*rows)
    clipped = FlowInverseDynamics(3, 2, 4, (8,), action_bounds=(-1.0, (1.0, 2.0)), at_bounds="clip")
    rows.action[:3, 1] = 2.0
    with pytest.raises(ConfigError, match="3 of 256 lie on one"):
        clipped.log_prob(*rows)
    many = FlowInverseDynamics(3, 5, 4, (8,), action_bounds=(-9.0, 9.0))
    with pytest.raises(ConfigError, match="log_prob of reflected actions needs 4 dimensions or fewer, got 5"):
        many.log_prob(rows.state, torch.zeros(256, 5), rows.next_state)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0, torch.inf), (0.0, (1.0, 1.0, 1.0))])
def test_bad_bounds(bounds: object) -> None:
    with pytest.raises(ConfigError, match="action_bounds must be"):
        FlowInverseDynamics(3, 2, 4, (8,), action_bounds=bounds)  # type: ignore[arg-type]
