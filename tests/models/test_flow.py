from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from invdyn.errors import ConfigError
from invdyn.models import FlowInverseDynamics, flow
from invdyn.models.conditional_base import Conditional, conditional_loss, log_volume, residual_of, target_of
from invdyn.models.flow import PredictionKind, SamplingSetting
from invdyn.models.velocity import NetworkKind
from tests.models.rows import make_rows, moments_of


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("network", ["unet", "film", "mlp"])
@pytest.mark.parametrize("prediction", ["velocity", "target"])
def test_sampling_is_euler_on_the_plain_network(network: NetworkKind, prediction: PredictionKind) -> None:
    rows = make_rows(rows=16)
    model = FlowInverseDynamics(3, 2, 4, (8, 8), network=network, prediction=prediction)
    model.fit_normalization(moments_of(rows))
    context, mean = model.encode_transition(rows.state, rows.next_state)
    x = torch.randn(1, 16, 2, generator=seeded(3))[0]
    for step in range(4):
        t = torch.full((16, 1), step / 4)
        output = model.network(x, t, context)
        x = x + 0.25 * (output if prediction == "velocity" else (output - x) / (1 - t))
    sample = model.sample(rows.state, rows.next_state, num_inference_steps=4, generator=seeded(3))
    torch.testing.assert_close(sample, model.decode(x[None], mean), rtol=1e-4, atol=1e-5)


def test_one_step_of_target_prediction_returns_the_prediction() -> None:
    rows = make_rows(rows=16)
    model = FlowInverseDynamics(3, 2, 4, (8, 8), prediction="target")
    context, mean = model.encode_transition(rows.state, rows.next_state)
    x_0 = torch.randn(1, 16, 2, generator=seeded(3))
    expected = model.network(x_0[0], torch.zeros(16, 1), context)
    sample = model.sample(rows.state, rows.next_state, num_inference_steps=1, generator=seeded(3))
    torch.testing.assert_close(sample, model.decode(expected[None], mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "target"])
def test_the_loss_is_zero_for_the_exact_prediction(prediction: PredictionKind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FlowInverseDynamics(3, 2, 4, (8, 8), prediction=prediction)
    target = torch.tensor([[1.0, -2.0]]).repeat(64, 1)

    def exact(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return (target - x) / (1 - t) if prediction == "velocity" else target

    monkeypatch.setattr(model.network, "forward", exact)
    noise = model.draw_noise(64, seeded(0))
    assert model.encoded_loss(torch.zeros(64, 6), target, noise).item() < 1e-6
    assert model.encoded_loss(torch.zeros(64, 6), target + 1.0, noise).item() > 0.1


def test_noise_is_standard_normal_and_times_are_uniform() -> None:
    x_0, t = FlowInverseDynamics(3, 2, 4, (8,)).draw_noise(20_000, seeded(0))
    assert x_0.mean(dim=0).abs().max() < 0.03
    assert (x_0.std(dim=0) - 1).abs().max() < 0.03
    assert t.min() >= 0
    assert t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert t.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_graded_times_are_more_often_near_the_end() -> None:
    """P(t > 1 - s) = s^(1 / grading)."""
    _, t = FlowInverseDynamics(3, 2, 4, (8,), time_grading=2.0).draw_noise(20_000, seeded(0))
    for share in (0.01, 0.25, 0.81):
        assert (t > 1.0 - share).float().mean().item() == pytest.approx(share**0.5, abs=0.01)


@pytest.mark.parametrize("grading", [0.5, float("inf"), float("nan")])
def test_gradings_that_are_none(grading: float) -> None:
    with pytest.raises(ConfigError, match="time_grading must be a number from 1, got"):
        FlowInverseDynamics(3, 2, 4, (8,), time_grading=grading)


def trained(state: Tensor, action: Tensor, next_state: Tensor, steps: int, **options: Any) -> FlowInverseDynamics:
    torch.manual_seed(0)
    model = FlowInverseDynamics(1, 1, 8, (64, 64), network="mlp", **options)
    rows = make_rows(rows=2)._replace(state=state, action=action, next_state=next_state)
    model.fit_normalization(moments_of(rows))
    encoded = model.encode(*rows)
    generator = seeded(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(state), (256,), generator=generator)
        model.encoded_loss(*(rows[batch] for rows in encoded), model.draw_noise(256, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def test_a_gaussian_posterior_is_recovered() -> None:
    """Action = sin(2 (s' - s)) + (0.2 + 0.2 [s > 0]) noise: mean and spread both depend on the transition."""
    generator = seeded(1)
    state, change, noise = (torch.randn(32768, 1, generator=generator) for _ in range(3))
    action = torch.sin(2 * change) + (0.2 + 0.2 * (state > 0)) * noise
    model = trained(state, action, state + change, steps=1000)
    probe_state, probe_change = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.5], [-0.3]])
    samples = model.sample(probe_state, probe_state + probe_change, 4000, num_inference_steps=20, generator=generator)
    mean, spread = samples.mean(dim=0)[:, 0], samples.std(dim=0)[:, 0]
    torch.testing.assert_close(mean, torch.sin(2 * probe_change)[:, 0], rtol=0, atol=0.08)
    torch.testing.assert_close(spread, torch.tensor([0.2, 0.4]), rtol=0, atol=0.08)


def test_both_branches_of_a_bimodal_posterior_are_sampled() -> None:
    """s' - s = action^2: both square roots are right, and their mean, 0, is wrong."""
    generator = seeded(1)
    sign = torch.randint(2, (32768, 1), generator=generator) * 2.0 - 1.0
    root = 0.5 + torch.rand(32768, 1, generator=generator)
    state = torch.randn(32768, 1, generator=generator)
    model = trained(state, sign * root, state + root**2, steps=1000)
    change = torch.tensor([[0.5], [1.5]])
    samples = model.sample(torch.zeros(2, 1), change, 2000, num_inference_steps=30, generator=generator)[..., 0]
    share = (samples > 0).float().mean(dim=0)
    assert ((share > 0.4) & (share < 0.6)).all()
    median = samples.abs().median(dim=0).values
    torch.testing.assert_close(median, change[:, 0].sqrt(), rtol=0, atol=0.08)
    assert (samples.abs() > 0.3).float().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diffusion_step_embed_dim": 5}, "diffusion_step_embed_dim must be even and positive, got 5"),
        ({"down_dims": ()}, r"down_dims must be one or more positive widths, got \[\]"),
        ({"down_dims": (8, 0)}, r"down_dims must be one or more positive widths, got \[8, 0\]"),
        ({"solver": "heun"}, "solver must be one of euler, midpoint, angular_euler, angular_midpoint, angular_adams"),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more, got 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowInverseDynamics(3, 2, **options)


def test_the_mean_and_spread_of_an_mlp_base() -> None:
    """One straight step gives the mean, one angular step a sample of the right spread."""
    generator = seeded(1)
    state, change, noise = (torch.randn(32768, 1, generator=generator) for _ in range(3))
    action = torch.sin(2 * change) + (0.05 + 0.2 * (state > 0)) * noise
    options = {"prediction": "angular", "base": "mlp", "base_dims": (64, 64)}
    model = trained(state, action, state + change, steps=800, **options)
    probe_state, probe_change = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.5], [-0.3]])
    first, samples = (
        model.sample(probe_state, probe_state + probe_change, 4000, num_inference_steps=1, solver=s)[..., 0]
        for s in ("euler", "angular_euler")
    )
    torch.testing.assert_close(first.mean(dim=0), torch.sin(2 * probe_change)[:, 0], rtol=0, atol=0.05)
    assert (first.std(dim=0) < torch.tensor([0.02, 0.1])).all()
    torch.testing.assert_close(samples.std(dim=0), torch.tensor([0.05, 0.25]), rtol=0, atol=0.06)


def test_the_base_learns_what_most_rows_say_and_the_flow_the_rest() -> None:
    """3 actions in 4 lie near 0, the fourth at 8, whatever the transition: distance asks for 0, squares for 2."""
    torch.manual_seed(0)
    model = FlowInverseDynamics(1, 2, 4, (32, 32), network="mlp", prediction="angular", base="mlp", base_dims=(16, 16))
    assert model.conditional is not None
    context = torch.randn(2048, 2, generator=seeded(0))
    target = 0.1 * torch.randn(2048, 2, generator=seeded(1))
    target[::4] += torch.tensor([8.0, 0.0])
    generator = seeded(2)
    for stage in (0, 1):
        model.enter_stage(stage)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            model.stage_loss(context, target, model.draw_noise(2048, generator)).backward()
            optimizer.step()
    seen, found = model.condition(context)
    assert found is not None
    assert found.mean.abs().mean() < 0.2
    end = model.carry(seen, torch.zeros(1, 2048, 2), SamplingSetting("euler", 1))[0]
    mean = target_of(found, end)
    torch.testing.assert_close(mean.mean(dim=0), torch.tensor([2.0, 0.0]), rtol=0, atol=0.4)


@pytest.mark.parametrize("gates", [-1, 9])
def test_more_gates_than_units(gates: int) -> None:
    with pytest.raises(ConfigError, match=rf"base_gates must be from 0 to base_dims\[0\] = 8, got {gates}"):
        FlowInverseDynamics(3, 2, 4, (8,), network="mlp", base="mlp", base_dims=(8, 4), base_gates=gates)


def test_a_row_spreads_no_wider_than_all_rows_together() -> None:
    model = FlowInverseDynamics(3, 2, 4, (8, 8), network="mlp", prediction="angular", base="mlp", base_dims=(8, 8))
    assert model.conditional is not None
    bias = model.conditional.log_scale[-1].bias
    bias.data.fill_(9.0)
    rows = make_rows(rows=16)
    model.fit_normalization(moments_of(rows))
    _, found = model.condition(model.encode(*rows)[0])
    assert found is not None
    assert -1e-3 < found.log_scale.min() <= found.log_scale.max() <= 0.0
    found.log_scale.sum().backward()
    assert bias.grad.min() > 0.0  # rows may come back from there


@pytest.mark.parametrize("tails", [0.0, -1.0, float("inf"), float("nan")])
def test_tails_that_are_no_distance(tails: float) -> None:
    with pytest.raises(ConfigError, match="base_tails must be a positive number or null, got"):
        FlowInverseDynamics(3, 2, 4, (8,), network="mlp", base="mlp", base_tails=tails)


def test_the_spread_is_that_of_a_laplace_density_of_the_errors() -> None:
    """9 errors of .1 and one of 3: the spread is sqrt(2) of their mean length, not the root of their mean square."""
    error = torch.tensor([[0.1]] * 9 + [[3.0]])
    log_scale = torch.tensor(2**0.5 * 0.39).log().requires_grad_()
    found = Conditional(torch.zeros(10, 1), log_scale.expand(10, 1), torch.zeros(10, 0))
    conditional_loss(found, error).backward()
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("tails", [None, 1.5])
def test_residuals_and_targets_are_one_to_one(tails: float | None) -> None:
    mean, log_scale, distance = torch.randn(3, 50, 2, generator=seeded(0)).double()
    found = Conditional(mean, log_scale, mean[:, :0], tails)
    target = mean + log_scale.exp() * 10.0 * distance
    residual = residual_of(found, target)
    torch.testing.assert_close(target_of(found, residual), target)
    near = distance.abs() < 0.01
    torch.testing.assert_close(residual[near], 10.0 * distance[near], rtol=1e-2, atol=0)
    assert (residual.abs() <= (1.0 + 1e-9) * (10.0 * distance).abs()).all()
    residual.requires_grad_()
    (slope,) = torch.autograd.grad(target_of(found, residual).sum(), residual)
    torch.testing.assert_close(log_volume(found, residual), slope.log().sum(dim=1))


@pytest.mark.parametrize("tails", [None, 3.0])
def test_no_sample_lies_farther_out_than_training_targets(tails: float | None) -> None:
    options = {"network": "mlp", "prediction": "angular", "base": "mlp", "base_dims": (8, 8), "base_tails": tails}
    model = FlowInverseDynamics(3, 2, 4, (8, 8), **options)  # type: ignore[arg-type]
    rows = make_rows(rows=16)
    noise = torch.full((1, 16, 2), 1e6)
    context, _ = model.encode_transition(rows.state, rows.next_state)
    targets = model._targets_from_noise(context, noise, 4, "angular_euler")
    _, found = model.condition(context)
    assert found is not None
    torch.testing.assert_close(targets[0], found.mean + 30.0 * found.log_scale.exp())


@pytest.mark.parametrize("tails", [None, 3.0])
def test_the_flow_learns_nothing_from_how_far_out_an_outlier_is(tails: float | None) -> None:
    options = {"network": "mlp", "prediction": "angular", "base": "mlp", "base_dims": (8, 8), "base_tails": tails}
    model = FlowInverseDynamics(3, 2, 4, (8, 8), **options)  # type: ignore[arg-type]
    context, noise = torch.randn(4, model.context_dim, generator=seeded(0)), model.draw_noise(4, seeded(1))
    gradients = []
    for distance in (10.0, 1e3, 1e6):  # of at most one spread each: 10 lies inside of 30
        loss = model.encoded_loss(context, torch.full((4, 2), distance), noise)
        (gradient,) = torch.autograd.grad(loss, [model.network.last_layer().bias])
        gradients.append(gradient)
    assert not torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[1], gradients[2])


@pytest.mark.parametrize(("num_samples", "rows"), [(3, 19), (8, 19), (1, 5)])
def test_samples_that_are_carried_block_by_block_are_those_carried_at_once(
    num_samples: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FlowInverseDynamics(3, 2, 4, (8, 8), network="mlp", prediction="angular", base="mlp", base_dims=(8, 8))
    states = torch.randn(2, rows, 3, generator=seeded(0)).unbind()
    at_once = model.sample(*states, num_samples, generator=seeded(1))
    calls = []
    whole = model.carry
    monkeypatch.setattr(model, "carry", lambda *args: calls.append(len(args[0])) or whole(*args))
    monkeypatch.setattr(flow, "BLOCK_ROWS", 6)
    torch.testing.assert_close(model.sample(*states, num_samples, generator=seeded(1)), at_once)
    assert sum(calls) == rows
    assert num_samples * max(calls) <= max(6, num_samples)


def test_only_validated_ways_of_sampling_are_accepted() -> None:
    model = FlowInverseDynamics(3, 2, 4, (8,))
    states = torch.zeros(4, 3), torch.zeros(4, 3)
    model.sample(*states, num_inference_steps=3, solver="midpoint")
    model.use_sampling(SamplingSetting("midpoint", 5), [SamplingSetting("euler", 2)])
    own = model.sample(*states, generator=seeded(0))
    assert torch.equal(own, model.sample(*states, num_inference_steps=5, solver="midpoint", generator=seeded(0)))
    model.sample(*states, num_inference_steps=2, solver="euler")
    with pytest.raises(ConfigError, match="got euler x 3, validated: euler x 2, midpoint x 5; use one of them"):
        model.sample(*states, num_inference_steps=3, solver="euler")
    model.sample(*states, num_inference_steps=3, solver="euler", allow_unvalidated=True)


def test_bad_arguments_of_sample() -> None:
    model = FlowInverseDynamics(3, 2, 4, (8,))
    with pytest.raises(ConfigError, match="num_inference_steps must be 1 or more, got 0"):
        model.sample(torch.zeros(1, 3), torch.zeros(1, 3), num_inference_steps=0)
    with pytest.raises(ConfigError, match=r"solver must be one of .*, got 'rk4'"):
        model.sample(torch.zeros(1, 3), torch.zeros(1, 3), solver="rk4")


COMPILE = """
import torch
from invdyn.models import FlowInverseDynamics
for network in ("unet", "film", "mlp"):
    model = FlowInverseDynamics(3, 2, 4, (8, 8), network=network, base="mlp", base_dims=(8,), prediction="angular")
    context, target, noise = torch.randn(5, 6), torch.randn(5, 2), model.draw_noise(5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(context, target, *noise), model(context, target, *noise))
"""


@pytest.mark.slow
def test_the_loss_compiles_without_graph_breaks() -> None:
    """In a process of its own: the shape checks of the test session would break the graph."""
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=300)
