"""Affine maps between physical units and what a network sees, from the moments of the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from invdyn.errors import DataError
from invdyn.statistics import Moments

FloatArray = Float[np.ndarray, "..."]

RELATIVE_RIDGE = 1e-10
"""Ridge added to the correlation matrix of the features. It lies above the rounding noise of float32 rows, which would
otherwise be fitted wherever two features are exactly collinear (semi-implicit Euler: x' - x = dt * v')."""

RESIDUAL_VARIANCE_FLOOR = 1e-10
"""Smallest variance of a whitened direction, relative to the variance of the action."""


@dataclass(frozen=True)
class Normalization:
    """Standardisation of features and the affine map between actions and targets.

    With z = (features - feature_mean) * feature_inverse_std: action = action_mean + z @ weight + target_scale @ target,
    and `target_inverse` is the (pseudo) inverse of `target_scale`. A column that is constant in the training rows has
    zeros in place of its scale: a constant feature contributes nothing, a constant action is returned exactly.

    Attributes:
        feature_mean: (features,) float64.
        feature_inverse_std: (features,) float64.
        action_mean: (actions,) float64.
        weight: (features, actions) float64.
        target_scale: (actions, actions) float64.
        target_inverse: (actions, actions) float64.
        error_weight: (actions, actions) float64, what a regression multiplies its error in targets by, symmetric: half
            way from whitened units, in which the direction that the linear base explains best counts as much as the one
            that it explains worst, to units of std(action), in which the first counts for nothing.
    """

    feature_mean: FloatArray
    feature_inverse_std: FloatArray
    action_mean: FloatArray
    weight: FloatArray
    target_scale: FloatArray
    target_inverse: FloatArray
    error_weight: FloatArray


def normalization(moments: Moments, num_features: int, *, linear_base: bool, scale_targets: bool) -> Normalization:
    """Compute the normalisation from the moments of [features, action].

    Args:
        moments: of the training rows; the first `num_features` columns are the features.
        num_features: number of feature columns.
        linear_base: subtract the ridge solution from the action; else subtract the mean (or nothing: `scale_targets`).
        scale_targets: whiten the residual of the linear base, or standardise each action where there is none. Without
            it targets keep physical units, and without a linear base they are the actions themselves.

    Raises:
        DataError: when the moments are not finite.
    """
    if not (np.isfinite(moments.mean).all() and np.isfinite(moments.comoment).all()):
        raise DataError("the statistics of the training rows must be finite, got NaN or infinity; extract them again")
    inverse_std = _inverse_std(moments)
    correlation = moments.covariance * np.outer(inverse_std, inverse_std)
    num_actions = len(moments.mean) - num_features
    weight = np.zeros((num_features, num_actions))
    residual = np.eye(num_actions)
    if linear_base:
        weight = ridge(correlation[:num_features, :num_features], correlation[:num_features, num_features:])
        residual = residual_covariance(correlation, weight)
    action_std = moments.std[num_features:]
    active = (inverse_std[num_features:] > 0).astype(np.float64)
    scale, inverse, weight_of_error = np.eye(num_actions), np.eye(num_actions), np.eye(num_actions)
    if scale_targets:
        factor = whitening_factor(residual, active)
        weight_of_error = error_weight(factor, active)
        scale = (action_std * active)[:, None] * factor
        inverse = np.linalg.inv(factor) * inverse_std[num_features:][None, :] * active[:, None]
    return Normalization(
        feature_mean=moments.mean[:num_features],
        feature_inverse_std=inverse_std[:num_features],
        action_mean=moments.mean[num_features:] if linear_base or scale_targets else np.zeros(num_actions),
        weight=weight * action_std,
        target_scale=scale,
        target_inverse=inverse,
        error_weight=weight_of_error,
    )


def ridge(
    correlation: Float[np.ndarray, "features features"], cross: Float[np.ndarray, "features actions"]
) -> Float[np.ndarray, "features actions"]:
    """Solve (correlation + ridge) weight = cross; collinear and constant (all-zero) features are welcome."""
    eigenvalues, vectors = np.linalg.eigh(correlation)
    solution: FloatArray = vectors @ ((vectors.T @ cross) / (np.maximum(eigenvalues, 0.0) + RELATIVE_RIDGE)[:, None])
    return solution


def residual_covariance(
    correlation: Float[np.ndarray, "columns columns"], weight: Float[np.ndarray, "features actions"]
) -> Float[np.ndarray, "actions actions"]:
    """Return the covariance of action - features @ weight, in the units of `correlation`."""
    difference = np.concatenate([-weight, np.eye(weight.shape[1])])
    covariance: FloatArray = difference.T @ correlation @ difference
    symmetric: FloatArray = (covariance + covariance.T) / 2
    return symmetric


def whitening_factor(
    covariance: Float[np.ndarray, "actions actions"], active: Float[np.ndarray, " actions"]
) -> Float[np.ndarray, "actions actions"]:
    """Return the lower Cholesky factor of a covariance with its eigenvalues floored; identity where not active."""
    eigenvalues, vectors = np.linalg.eigh(covariance * np.outer(active, active))
    floored = vectors @ np.diag(np.maximum(eigenvalues, RESIDUAL_VARIANCE_FLOOR)) @ vectors.T
    floored = np.where(np.outer(active, active) > 0, floored, np.diag(1.0 - active))
    factor: FloatArray = np.linalg.cholesky((floored + floored.T) / 2)
    return factor


def error_weight(
    factor: Float[np.ndarray, "actions actions"], active: Float[np.ndarray, " actions"]
) -> Float[np.ndarray, "actions actions"]:
    """Return the fourth root of factor.T @ factor, whose square root has mean 1 on its diagonal; 1 where not active."""
    weight = np.eye(len(active))
    varies = np.flatnonzero(active)
    if len(varies):
        part = factor[np.ix_(varies, varies)]
        eigenvalues, vectors = np.linalg.eigh(part.T @ part)
        roots = np.sqrt(np.maximum(eigenvalues, 0.0))
        weight[np.ix_(varies, varies)] = (vectors * np.sqrt(roots / roots.mean())) @ vectors.T
    return weight


def _inverse_std(moments: Moments) -> FloatArray:
    """1 / std of each column; 0 where the column is constant but for rounding."""
    inverse: FloatArray = np.divide(1.0, moments.std, where=moments.varies, out=np.zeros_like(moments.std))
    return inverse
