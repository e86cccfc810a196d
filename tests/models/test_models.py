"""Properties that hold for every model, whatever it predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from invdyn.errors import ConfigError, DataError
from invdyn.models import (
    FlowInverseDynamics,
    GaussianRegression,
    GradientBoostedTrees,
    InverseDynamics,
    LinearInverse,
    MixtureDensity,
    MLPRegression,
    NearestNeighbours,
)
from invdyn.models.constant_dims import WithConstantDims
from invdyn.models.fitted import FittedModel
from tests.models.rows import Rows, make_rows, moments_of

Build = Callable[..., InverseDynamics]


def flow(**options: Any) -> Build:
    settings = {"diffusion_step_embed_dim": 4, "down_dims": (8, 12), "num_inference_steps": 3} | options
    return lambda *dims, **window: FlowInverseDynamics(*dims, **settings, **window)


MODELS: dict[str, Build] = {
    "linear": LinearInverse,
    "mlp_regression": lambda *dims, **window: MLPRegression(*dims, (8, 12), **window),
    "gaussian": lambda *dims, **window: GaussianRegression(*dims, (8, 12), **window),
    "gaussian_raw": lambda *dims, **window: GaussianRegression(
        *dims, (8, 12), covariance="diagonal", base="none", normalize=False, **window
    ),
    "mixture": lambda *dims, **window: MixtureDensity(*dims, 3, (8, 12), **window),
    "mixture_diagonal": lambda *dims, **window: MixtureDensity(*dims, 3, (8, 12), covariance="diagonal", **window),
    "nearest_neighbours": NearestNeighbours,
    "trees": lambda *dims, **window: GradientBoostedTrees(*dims, max_iter=5, **window),
    "unet_velocity": flow(network="unet"),
    "unet_target": flow(network="unet", prediction="target"),
    "unet_reference": flow(network="unet", base="none", normalize=False),
    "mlp_velocity": flow(network="mlp"),
    "mlp_target": flow(network="mlp", prediction="target", base="none"),
    "mlp_angular": flow(network="mlp", prediction="angular", solver="angular_midpoint"),
    "film_on_mlp": flow(network="film", down_dims=(8, 8), prediction="angular", base="mlp", base_dims=(8, 12)),
    "mlp_on_gated_mlp": flow(
        network="mlp", prediction="angular", base="mlp", base_dims=(8, 12), base_gates=3, base_tails=2.0
    ),
    "mlp_raw_base": flow(network="mlp", normalize=False, solver="midpoint"),
}
POINTS = ("linear", "mlp_regression", "trees")
RAW = ("unet_reference", "mlp_raw_base", "gaussian_raw")
WINDOWS = [{"history": 0, "horizon": 1}, {"history": 2, "horizon": 1}, {"history": 1, "horizon": 4}]

every_model = pytest.mark.parametrize("name", MODELS)


def fitted(name: str, rows: Rows, **window: int) -> InverseDynamics:
    torch.manual_seed(0)
    horizon = window.get("horizon", 1)
    model = MODELS[name](rows.next_state.shape[1], rows.action.shape[-1], **window)
    assert rows.action.dim() == (3 if horizon > 1 else 2)
    model.fit_normalization(moments_of(rows))
    if isinstance(model, FittedModel):
        model.fit(*model.encode(*rows))
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_model
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_shapes(name: str, window: dict[str, int]) -> None:
    rows = make_rows(**window)
    model = fitted(name, rows, **window)
    context, target = model.encode(*rows)
    assert context.dtype == target.dtype == torch.float32
    assert context.shape == (256, (window["history"] + 2) * 3)
    assert target.shape == (256, window["horizon"] * 2)
    assert all(len(tensor) == 256 for tensor in model.draw_noise(256))
    assert model.loss(*rows).shape == ()
    samples = model.sample(rows.state, rows.next_state, 5)
    assert samples.shape == (5, *rows.action.shape)
    assert samples.dtype == torch.float32
    assert torch.isfinite(samples).all()
    assert not samples.requires_grad


@every_model
def test_empty_batch(name: str) -> None:
    rows = make_rows()
    model = fitted(name, rows)
    empty = Rows(*(tensor[:0] for tensor in rows))
    assert model.encode(*empty)[1].shape == (0, 2)
    assert model.sample(empty.state, empty.next_state, 2).shape == (2, 0, 2)


@every_model
def test_the_gradient_reaches_every_parameter(name: str) -> None:
    rows = make_rows()
    model = fitted(name, rows)
    if not model.trainable:
        assert list(model.parameters()) == []
        return
    if model.num_stages == 2:  # this layer starts at zero, and would stop the gradient of the first step
        torch.nn.init.normal_(model.network.last_layer().weight)  # type: ignore[union-attr,operator]
    model.loss(*rows).backward()
    unreached = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert unreached == []


@every_model
def test_saved_and_loaded_weights_sample_the_same_actions(name: str, tmp_path: Path) -> None:
    rows = make_rows()
    model = fitted(name, rows)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    loaded = MODELS[name](3, 2)
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    samples = [m.sample(rows.state, rows.next_state, 2, generator=seeded(3)) for m in (model, loaded)]
    assert torch.equal(*samples)


@every_model
def test_the_generator_decides_the_samples(name: str) -> None:
    rows = make_rows()
    model = fitted(name, rows)
    first, again, other = (model.sample(rows.state, rows.next_state, 2, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    generative = name not in POINTS
    assert torch.equal(first, other) != generative
    assert torch.equal(first[0], first[1]) != generative
    losses = [model.loss(*rows, generator=seeded(3)) for _ in range(2)]
    assert torch.equal(*losses)


@every_model
def test_sampling_is_the_map_of_drawn_noise(name: str) -> None:
    rows = make_rows()
    model = fitted(name, rows)
    noise = torch.randn(4, len(rows.state), model.noise_dim, generator=seeded(3))
    expected = model.sample(rows.state, rows.next_state, 4, num_inference_steps=2, generator=seeded(3))
    found = model.sample_from(rows.state, rows.next_state, noise, num_inference_steps=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, check_stride=False)
    assert found.requires_grad == model.trainable


@pytest.mark.parametrize("name", [name for name in MODELS if name not in RAW])
def test_predictions_keep_the_units_of_the_data(name: str) -> None:
    rows = make_rows()
    scaled = Rows(rows.state * 2.0**10, rows.action / 2.0**7, rows.next_state * 2.0**10)
    samples, scaled_samples = (
        fitted(name, data).sample(data.state, data.next_state, 2, generator=seeded(3)) for data in (rows, scaled)
    )
    torch.testing.assert_close(scaled_samples * 2.0**7, samples, rtol=1e-5, atol=1e-5)


@every_model
def test_decode_inverts_encode(name: str) -> None:
    rows = make_rows(history=1, horizon=4)
    model = fitted(name, rows, history=1, horizon=4)
    _, target = model.encode(*rows)
    _, mean = model.encode_transition(rows.state, rows.next_state)
    torch.testing.assert_close(model.decode(target[None], mean)[0], rows.action, rtol=1e-5, atol=1e-5)


@every_model
def test_forward_is_the_encoded_loss_of_the_last_stage(name: str) -> None:
    rows = make_rows()
    model = fitted(name, rows)
    model.enter_stage(model.num_stages - 1)
    encoded = model.encode(*rows)
    noise = model.draw_noise(256, seeded(1))
    assert torch.equal(model(*encoded, *noise), model.encoded_loss(*encoded, noise))


@every_model
def test_rows_are_predicted_independently(name: str) -> None:
    rows = make_rows()
    model = fitted(name, rows)
    noise = torch.randn(3, 256, model.noise_dim, generator=seeded(0))
    whole = model.sample_from(rows.state, rows.next_state, noise)
    half = model.sample_from(rows.state[:128], rows.next_state[:128], noise[:, :128])
    torch.testing.assert_close(whole[:, :128], half, rtol=1e-4, atol=1e-5)


@every_model
def test_constant_columns_stay_finite_and_constant_actions_are_exact(name: str) -> None:
    rows = make_rows()
    state, action, next_state = (tensor.clone() for tensor in rows)
    state[:, 1] = next_state[:, 1] = 0.3
    action[:, 0] = -1.7
    data = Rows(state, action, next_state)
    model = fitted(name, data)
    samples = model.sample(state, next_state, 4)
    assert torch.isfinite(samples).all()
    assert torch.isfinite(model.loss(*data))
    if model.normalize:
        assert torch.equal(samples[..., 0], torch.full((4, 256), -1.7))
        elsewhere = state.clone()
        elsewhere[:, 1] = 1e6
        moved = model.encode_transition(elsewhere, next_state)[0]
        torch.testing.assert_close(moved, model.encode_transition(state, next_state)[0])


def test_arrays_are_refused_in_words(without_shape_checks: None) -> None:
    rows = make_rows()
    arrays = rows.state.numpy(), rows.next_state.numpy()
    inner = LinearInverse(3, 2)
    with pytest.raises(DataError, match="must be tensors, got ndarray and ndarray; use torch"):
        inner.sample(*arrays)
    with pytest.raises(DataError, match="must be tensors, got Tensor and ndarray"):
        inner.sample(rows.state, arrays[1])
    with pytest.raises(DataError, match="must be tensors, got ndarray and ndarray"):
        WithConstantDims(LinearInverse(2, 2), [(0, 1.0)], []).sample(*arrays)


@every_model
def test_other_dimensions_are_refused(name: str) -> None:
    rows = make_rows()
    model = fitted(name, rows)
    with pytest.raises(DataError, match=r"state and next_state must be \(batch, 3\) and \(batch, 3\), got \(256, 4\)"):
        model.sample(torch.zeros(256, 4), rows.next_state)
    with pytest.raises(DataError, match=r"action must be \(256, 2\), got \(256, 3\)"):
        model.encode(rows.state, torch.zeros(256, 3), rows.next_state)
    with pytest.raises(DataError, match=r"6 features and 2 action columns .* got 9 columns"):
        model.fit_normalization(moments_of(make_rows(action_dim=3)))
    with pytest.raises(ConfigError, match="num_samples must be 1 or more, got 0"):
        model.sample(rows.state, rows.next_state, 0)


@every_model
def test_statistics_that_are_not_finite_are_refused(name: str) -> None:
    moments = moments_of(make_rows())
    broken = replace(moments, mean=np.full_like(moments.mean, np.nan))
    with pytest.raises(DataError, match="must be finite"):
        MODELS[name](3, 2).fit_normalization(broken)


class StandardNormal(LinearInverse):
    """The linear inverse with its whitened residual taken for N(0, I)."""

    def _target_log_prob(self, context: Tensor, target: Tensor) -> Tensor:
        return Normal(0.0, 1.0).log_prob(target).sum(dim=1)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_log_prob_is_a_density_per_unit_of_the_action(window: dict[str, int]) -> None:
    rows = make_rows(**window)
    model = StandardNormal(3, 2, **window)
    model.fit_normalization(moments_of(rows))
    mean = model.encode_transition(rows.state, rows.next_state)[1]
    factor = model.target_scale.double()
    expected = MultivariateNormal(mean, covariance_matrix=factor @ factor.T)
    action = rows.action.reshape(256, -1).double()
    found = model.log_prob(*rows)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.log_prob(action), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_density_says_so() -> None:
    rows = make_rows()
    with pytest.raises(ConfigError, match="log_prob needs a model with a density, which this one has not"):
        fitted("linear", rows).log_prob(*rows)


def test_a_constant_action_has_no_density() -> None:
    rows = make_rows()
    rows.action[:, 1] = 0.25
    model = StandardNormal(3, 2)
    model.fit_normalization(moments_of(rows))
    with pytest.raises(ConfigError, match=r"dimensions \[1\] are constant; .* drop_constant_dims"):
        model.log_prob(*rows)
