"""The densities against torch's own, and against what samples do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from invdyn.errors import ConfigError
from invdyn.models import GaussianRegression, MixtureDensity
from invdyn.models.mixture_density import SHARPEST, WIDEST, Mixture, pick
from tests.models.rows import Rows, make_rows, moments_of

KINDS: list[dict[str, Any]] = [
    {"num_components": 1, "covariance": "full"},
    {"num_components": 1, "covariance": "diagonal"},
    {"num_components": 4, "covariance": "full"},
    {"num_components": 4, "covariance": "diagonal", "base": "none"},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def fitted(rows: Rows, **kind: Any) -> MixtureDensity:
    torch.manual_seed(0)
    model = MixtureDensity(3, 2, down_dims=(16,), **kind)
    model.fit_normalization(moments_of(rows))
    with torch.no_grad():  # weights of a network that has learned something: spreads and correlations that vary
        for parameter in model.network.parameters():
            parameter.mul_(3.0)
    return model


def reference(mixture: Mixture) -> MixtureSameFamily:
    """The same distribution built from torch's parts, by way of the covariance."""
    factor = torch.diag_embed(mixture.log_precision.exp())
    if mixture.below is not None:
        factor = factor + mixture.below
    covariance = torch.linalg.inv(factor.mT @ factor)
    return MixtureSameFamily(Categorical(logits=mixture.log_weight), MultivariateNormal(mixture.mean, covariance))


@every_kind
def test_log_prob_equals_that_of_torch(kind: dict[str, Any]) -> None:
    rows = make_rows()
    model = fitted(rows, **kind)
    context, mean = model.encode_transition(rows.state, rows.next_state)
    targets = (rows.action.double() - mean) @ model.target_inverse.double().T
    expected = reference(model.mixture(context).double()).log_prob(targets)
    volume = torch.linalg.slogdet(model.target_inverse.double()).logabsdet
    found = model.log_prob(*rows)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected + volume, rtol=1e-9, atol=1e-9)
    loss = model.loss(*rows).double()
    torch.testing.assert_close(loss, -expected.mean(), rtol=1e-4, atol=1e-4)


@every_kind
def test_the_density_of_the_action_integrates_to_one(kind: dict[str, Any]) -> None:
    rows = make_rows()
    model = fitted(rows, **kind)
    one = [tensor[:1] for tensor in rows]
    draws = model.sample(one[0], one[2], 4000, generator=torch.Generator().manual_seed(0))[:, 0].double()
    low, high = draws.min(dim=0).values, draws.max(dim=0).values
    centre, half = (low + high) / 2, (high - low) * 0.8
    steps = 400
    axes = [torch.linspace(float(c - h), float(c + h), steps) for c, h in zip(centre, half, strict=True)]
    grid = torch.cartesian_prod(*axes)
    state, next_state = one[0].expand(len(grid), -1), one[2].expand(len(grid), -1)
    cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    density = model.log_prob(state, grid, next_state).detach().exp()
    assert float(density.sum()) * cell == pytest.approx(1.0, abs=0.01)


@every_kind
def test_samples_follow_the_density(kind: dict[str, Any]) -> None:
    """Mean and covariance of many draws of one transition, and their mean log density against the entropy."""
    rows = make_rows()
    model = fitted(rows, **kind)
    context, _ = model.encode_transition(rows.state[:1], rows.next_state[:1])
    distribution = reference(model.mixture(context).double())
    noise = torch.randn(40_000, 1, model.noise_dim, generator=torch.Generator().manual_seed(0))
    found = model._targets_from_noise(context, noise, None, None)[:, 0].detach().double()
    expected = distribution.sample((40_000,))[:, 0]
    spread = expected.std(dim=0)
    torch.testing.assert_close(found.mean(dim=0) / spread, expected.mean(dim=0) / spread, rtol=0, atol=0.03)
    torch.testing.assert_close(
        found.T.cov() / spread.outer(spread), expected.T.cov() / spread.outer(spread), rtol=0, atol=0.05
    )
    density = [distribution.log_prob(draws[:, None])[:, 0].mean().item() for draws in (found, expected)]
    assert density[0] == pytest.approx(density[1], abs=0.03)


def two_branches(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Actions +-(1 + s') with a little noise: the mean is never right."""
    generator = torch.Generator().manual_seed(0)
    state, next_state = torch.zeros(rows, 1), torch.rand(rows, 1, generator=generator)
    sign = torch.randint(0, 2, (rows, 1), generator=generator) * 2.0 - 1.0
    return state, sign * (1 + next_state) + 0.05 * torch.randn(rows, 1, generator=generator), next_state


def test_training_finds_both_branches() -> None:
    state, action, next_state = data = two_branches(4000)
    torch.manual_seed(0)
    model = MixtureDensity(1, 1, 4, (32,))
    model.fit_normalization(moments_of(Rows(*data)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(*data).backward()
        optimizer.step()
    draws = model.sample(state[:500], next_state[:500], 20, generator=torch.Generator().manual_seed(0))
    size = 1 + next_state[:500]
    assert ((draws.abs() - size).abs() < 0.25).double().mean() > 0.97
    assert 0.4 < (draws > 0).double().mean() < 0.6
    entropy = 0.5 * torch.log(torch.tensor(2 * torch.pi * torch.e * 0.05**2)) + torch.log(torch.tensor(2.0))
    assert model.log_prob(*data).mean().item() == pytest.approx(-entropy.item(), abs=0.1)
    assert float((action.abs() - 1 - next_state).std()) == pytest.approx(0.05, rel=0.1)


def test_points_are_never_infinitely_likely() -> None:
    """Targets that are predicted exactly: the likelihood stops at the sharpest spread, and gradients stay finite."""
    model = GaussianRegression(1, 2, (4,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.network[-1].bias[2:4] = 1e4  # the raw log precisions
    rows = [torch.zeros(5, 1), torch.zeros(5, 2), torch.zeros(5, 1)]
    expected = 2 * SHARPEST - torch.log(torch.tensor(2 * torch.pi)).item()
    assert model.log_prob(*rows).tolist() == pytest.approx([expected] * 5, abs=1e-3)
    loss = model.loss(*rows)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    with torch.no_grad():
        model.network[-1].bias[2:4] = -1e4
    assert model.mixture(torch.zeros(1, 2)).log_precision.tolist() == [[[WIDEST, WIDEST]]]


def test_picking_follows_the_weights() -> None:
    weight = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(pick(weight, noise)[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(share, weight[0], rtol=0, atol=0.015)
    assert pick(weight, torch.tensor([[-40.0], [40.0]])).tolist() == [[0], [3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "num_components must be 1 or more, got 0"),
        ({"down_dims": (8, 0)}, r"down_dims must be one or more positive widths, got \[8, 0\]"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureDensity(2, 1, **options)
