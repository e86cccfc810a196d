from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invdyn.models import LinearInverse, MLPRegression
from invdyn.models.features import transition_features
from invdyn.models.linear_base import normalization, residual_covariance, ridge, whitening_factor
from invdyn.statistics import transition_features as numpy_features
from tests.models.rows import Rows, make_rows, moments_of


@given(state_dim=st.integers(1, 4), history=st.integers(0, 3), seed=st.integers(0, 99))
def test_features_agree_with_numpy_to_the_bit(state_dim: int, history: int, seed: int) -> None:
    rows = make_rows(state_dim, 1, history, rows=5, seed=seed)
    ours = transition_features(rows.state, rows.next_state)
    assert ours.dtype == torch.float64
    assert np.array_equal(ours.numpy(), numpy_features(rows.state.numpy(), rows.next_state.numpy()))


def test_differences_keep_what_float32_would_lose() -> None:
    state, next_state = torch.tensor([[1000.0]]), torch.tensor([[1000.0001]])
    assert transition_features(state, next_state)[0, 1] == next_state.double()[0, 0] - 1000.0


@pytest.mark.parametrize("history", [0, 2])
def test_linear_inverse_is_least_squares(history: int) -> None:
    rows = make_rows(history=history)
    model = LinearInverse(3, 2, history=history)
    model.fit_normalization(moments_of(rows))
    features = numpy_features(rows.state.numpy(), rows.next_state.numpy())
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    solution = np.linalg.lstsq(design, rows.action.double().numpy(), rcond=None)[0]
    prediction = model.sample(rows.state, rows.next_state, 3)
    assert prediction.shape == (3, 256, 2)
    np.testing.assert_allclose(prediction[1].numpy(), design @ solution, rtol=0, atol=1e-6)


def test_collinear_and_constant_features_give_the_same_predictions_as_without_them() -> None:
    rows = make_rows(state_dim=2)
    doubled = Rows(
        torch.cat([rows.state, 3 * rows.state, torch.ones(256, 1)], dim=1),
        rows.action,
        torch.cat([rows.next_state, 3 * rows.next_state, torch.ones(256, 1)], dim=1),
    )
    small, large = LinearInverse(2, 2), LinearInverse(5, 2)
    small.fit_normalization(moments_of(rows))
    large.fit_normalization(moments_of(doubled))
    assert large.weight.abs().max() < 10
    torch.testing.assert_close(
        large.sample(doubled.state, doubled.next_state), small.sample(rows.state, rows.next_state), rtol=0, atol=1e-5
    )


def test_rounding_noise_of_collinear_features_is_not_fitted() -> None:
    random = np.random.default_rng(0)
    velocity = random.normal(size=(4096, 1))
    action = random.normal(size=(4096, 1)).astype(np.float32)
    state = np.concatenate([random.normal(size=(4096, 1)), velocity], axis=1)
    next_velocity = velocity + 0.1 * action
    next_state = np.concatenate([state[:, :1] + 0.02 * next_velocity, next_velocity], axis=1)
    rows = Rows(*(torch.from_numpy(array.astype(np.float32)) for array in (state, action, next_state)))
    model = LinearInverse(2, 1)
    model.fit_normalization(moments_of(rows))
    assert model.weight.abs().max() < 20
    assert (model.sample(rows.state, rows.next_state)[0] - rows.action).square().mean().sqrt() < 1e-5


def test_whitened_residuals_have_zero_mean_and_unit_covariance() -> None:
    rows = make_rows(horizon=2)
    model = LinearInverse(3, 2, horizon=2)
    model.fit_normalization(moments_of(rows))
    _, target = model.encode(*rows)
    np.testing.assert_allclose(target.mean(dim=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(target.T.cov(correction=0), np.eye(4), atol=1e-3)
    assert model.loss(*rows) == pytest.approx(1.0, rel=1e-3)


def test_residual_covariance_is_that_of_the_rows() -> None:
    moments = moments_of(make_rows())
    weight = ridge(moments.covariance[:6, :6], moments.covariance[:6, 6:])
    rows = make_rows()
    features = numpy_features(rows.state.numpy(), rows.next_state.numpy())
    residual = rows.action.numpy() - features @ weight
    np.testing.assert_allclose(
        residual_covariance(moments.covariance, weight), np.cov(residual.T, bias=True), rtol=1e-6, atol=1e-9
    )


def test_an_exact_linear_relation_has_a_bounded_whitening() -> None:
    factor = whitening_factor(np.zeros((2, 2)), np.array([1.0, 0.0]))
    np.testing.assert_allclose(factor, np.diag([1e-5, 1.0]))


def test_errors_are_weighed_half_way_from_whitened_to_physical_units() -> None:
    rows = make_rows(horizon=2)
    rows.action[:, 1, 0] = 3.0  # constant
    model = MLPRegression(3, 2, (8,), horizon=2)
    moments = moments_of(rows)
    model.fit_normalization(moments)
    fitted = normalization(moments, 6, linear_base=True, scale_targets=True)
    varies = [0, 1, 3]
    physical = fitted.target_scale[np.ix_(varies, varies)] / moments.std[6:][varies, None]  # in units of std(action)
    square = (fitted.error_weight @ fitted.error_weight)[np.ix_(varies, varies)]
    ratio = (square @ square) / (physical.T @ physical)
    np.testing.assert_allclose(ratio, ratio[0, 0])
    assert square.trace() == pytest.approx(3)
    assert fitted.error_weight[2].tolist() == fitted.error_weight[:, 2].tolist() == [0, 0, 1, 0]
    error = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = np.square(error.numpy() @ fitted.error_weight).mean()
    assert float(model.squared_error(error, torch.zeros(5, 4))) == pytest.approx(expected, rel=1e-5)


def test_one_action_is_not_weighed() -> None:
    fitted = normalization(moments_of(make_rows(action_dim=1)), 6, linear_base=True, scale_targets=True)
    np.testing.assert_allclose(fitted.error_weight, [[1.0]])


def test_without_base_each_action_is_standardised() -> None:
    rows = make_rows()
    moments = moments_of(rows)
    fitted = normalization(moments, 6, linear_base=False, scale_targets=True)
    assert not fitted.weight.any()
    np.testing.assert_allclose(fitted.error_weight, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(fitted.target_scale, np.diag(moments.std[6:]))
    np.testing.assert_allclose(fitted.target_inverse @ fitted.target_scale, np.eye(2), atol=1e-12)


@pytest.mark.parametrize("linear_base", [True, False])
@pytest.mark.parametrize("column", [0, 6], ids=["feature", "action"])
def test_constant_but_for_rounding_is_constant(column: int, linear_base: bool) -> None:
    moments = moments_of(make_rows())
    comoment, maximum = moments.comoment.copy(), moments.maximum.copy()
    rounding, signal = 4e-8 * 5.0, moments.std[1]
    comoment[column, :] = comoment[:, column] = moments.count * 0.5 * rounding * signal
    comoment[column, column] = moments.count * rounding**2
    maximum[column] = 5.0
    noisy = replace(moments, comoment=comoment, maximum=maximum)
    fitted = normalization(noisy, 6, linear_base=linear_base, scale_targets=True)
    if column == 0:
        assert fitted.feature_inverse_std[0] == 0
        assert not fitted.weight[0].any()
    else:
        assert not fitted.weight[:, 0].any()
        assert not fitted.target_scale[0].any()
        assert not fitted.target_inverse[0].any()
