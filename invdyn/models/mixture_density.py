"""Baselines with a density in closed form: a Gaussian whose spread depends on the transition, and mixtures of them.

Source: Bishop, "Mixture density networks" (1994), with covariances as Cholesky factors of the precision: the loss then
needs no solve, and the logarithm of the determinant is a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from invdyn.errors import ConfigError
from invdyn.models.base import BaseKind, InverseDynamics, Noise
from invdyn.models.networks import build_mlp

CovarianceKind = Literal["diagonal", "full"]

SHARPEST, WIDEST = 10.0, -3.0
"""Bounds of the logarithm of 1 / (standard deviation of a whitened residual): e^-10 to e^3. The likelihood of a point
that is predicted exactly grows without bound as its spread vanishes; this is where it stops."""


@dataclass(frozen=True)
class Mixture:
    """Gaussian components of a batch of targets, c components of d dimensions.

    Attributes:
        log_weight: (batch, c), normalised.
        mean: (batch, c, d).
        log_precision: (batch, c, d), logarithm of the diagonal of the Cholesky factor of the precision.
        below: (batch, c, d, d), the factor below its diagonal; None where covariances are diagonal.
    """

    log_weight: Tensor
    mean: Tensor
    log_precision: Tensor
    below: Tensor | None

    def log_prob(self, target: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
        """Return the log density of each target, nats."""
        residual = target[:, None] - self.mean
        white = residual * self.log_precision.exp()
        if self.below is not None:
            white = white + (self.below * residual[:, :, None]).sum(dim=-1)  # cheaper than a batch of small products
        constant = 0.5 * target.shape[1] * math.log(2.0 * math.pi)
        component = self.log_precision.sum(dim=-1) - 0.5 * white.square().sum(dim=-1) - constant
        return torch.logsumexp(self.log_weight + component, dim=1)

    def sample(self, noise: Float[Tensor, "samples batch d"], which: Tensor) -> Float[Tensor, "samples batch d"]:
        """Return targets of the components `which` (samples, batch) from N(0, I): mean + factor^-1 noise."""
        rows = torch.arange(noise.shape[1], device=noise.device).expand(which.shape)
        mean, scale = self.mean[rows, which], (-self.log_precision[rows, which]).exp()
        if self.below is None:
            return mean + noise * scale
        factor = self.below[rows, which] + torch.diag_embed(1.0 / scale)
        white: Tensor = torch.linalg.solve_triangular(factor, noise[..., None], upper=False)
        return mean + white[..., 0]

    def double(self) -> Mixture:
        """Return the same in float64."""
        below = None if self.below is None else self.below.double()
        log_weight = functional.log_softmax(self.log_weight.double(), dim=1)  # normalised to the last digit
        return Mixture(log_weight, self.mean.double(), self.log_precision.double(), below)


class MixtureDensity(InverseDynamics):
    """A mixture density network on the normalised residual of the action.

    Args:
        state_dim: size of one state.
        action_dim: size of one action.
        num_components: Gaussians in the mixture.
        down_dims: widths of the hidden layers.
        covariance: "full", or "diagonal" in the normalised residual.
        base: "linear" to model the whitened residual of the ridge solution.
        normalize: standardise inside the model.
        history: number of past states.
        horizon: number of actions predicted.

    Raises:
        ConfigError: when a size is below 1, or the covariance is unknown.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        num_components: int = 8,
        down_dims: Sequence[int] = (128, 128, 128),
        *,
        covariance: CovarianceKind = "full",
        base: BaseKind = "linear",
        normalize: bool = True,
        history: int = 0,
        horizon: int = 1,
    ) -> None:
        super().__init__(state_dim, action_dim, history=history, horizon=horizon, base=base, normalize=normalize)
        if num_components < 1:
            raise ConfigError(f"num_components must be 1 or more, got {num_components}")
        if covariance not in get_args(CovarianceKind):
            raise ConfigError(f"covariance must be full or diagonal, got {covariance!r}")
        self.num_components, dim = num_components, self.target_dim
        has_below = covariance == "full" and dim > 1
        # One component has weight 1: it needs no logit.
        self.sizes = [
            num_components if num_components > 1 else 0,
            num_components * dim,
            num_components * dim,
            num_components * dim * (dim - 1) // 2 if has_below else 0,
        ]
        self.has_below = has_below
        self.network = build_mlp(self.context_dim, down_dims, sum(self.sizes))
        if num_components > 1:
            self._spread_means()

    @override
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the mean negative log density of the targets, nats; `noise` is empty."""
        return -self.mixture(context).log_prob(target).mean()

    @property
    @override
    def noise_dim(self) -> int:
        """One column that picks the component, where there are several, then those of the Gaussian."""
        return self.target_dim + (self.num_components > 1)

    def mixture(self, context: Float[Tensor, "batch context"]) -> Mixture:
        """Return the components of each row."""
        logits, mean, raw, below = torch.split(self.network(context), self.sizes, dim=1)
        shape = (self.num_components, self.target_dim)
        if not self.sizes[0]:
            logits = torch.zeros_like(mean[:, :1])  # not len(): it would fix the batch size of an exported program
        return Mixture(
            functional.log_softmax(logits, dim=1),
            mean.unflatten(1, shape),
            _between_bounds(raw).unflatten(1, shape),
            self._below_diagonal(below) if self.has_below else None,
        )

    @override
    def _targets_from_noise(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        mixture = self.mixture(context)
        which = torch.zeros(noise.shape[:-1], dtype=torch.long, device=noise.device)
        if self.num_components > 1:
            which = pick(mixture.log_weight.exp(), noise[..., 0])
        return mixture.sample(noise[..., -self.target_dim :], which)

    @override
    def _target_log_prob(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"]
    ) -> Float[Tensor, " batch"]:
        return self.mixture(context).double().log_prob(target)

    def _below_diagonal(self, values: Float[Tensor, "batch entries"]) -> Tensor:
        """Return (batch, components, d, d) with `values` below the diagonal."""
        dim = self.target_dim
        entries: Tensor = values.unflatten(1, (self.num_components, -1))
        rows, columns = torch.tril_indices(dim, dim, offset=-1, device=values.device)
        full = entries.new_zeros(*entries.shape[:2], dim * dim).index_copy(2, rows * dim + columns, entries)
        return full.reshape(-1, self.num_components, dim, dim)

    @torch.no_grad()
    def _spread_means(self) -> None:
        """Start the components apart: equal ones get equal gradients, and stay equal."""
        first = self.sizes[0]
        bias = self.network[-1].bias
        assert isinstance(bias, Tensor)
        torch.nn.init.normal_(bias[first : first + self.sizes[1]])


class GaussianRegression(MixtureDensity):
    """A Gaussian whose mean and covariance depend on the transition: a mixture of one component.

    Arguments as in `MixtureDensity`.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        down_dims: Sequence[int] = (128, 128, 128),
        *,
        covariance: CovarianceKind = "full",
        base: BaseKind = "linear",
        normalize: bool = True,
        history: int = 0,
        horizon: int = 1,
    ) -> None:
        super().__init__(
            state_dim,
            action_dim,
            1,
            down_dims,
            covariance=covariance,
            base=base,
            normalize=normalize,
            history=history,
            horizon=horizon,
        )


def pick(weight: Float[Tensor, "batch choices"], noise: Float[Tensor, "samples batch"]) -> Tensor:
    """Return which choice each N(0, 1) number takes, (samples, batch): its quantile looked up in the summed weights.

    Example:
        >>> pick(torch.tensor([[0.5, 0.5]]), torch.tensor([[-0.1], [0.1]])).tolist()
        [[0], [1]]
    """
    edges = weight.cumsum(dim=1)
    level: Tensor = torch.special.ndtr(noise) * edges[:, -1]
    return (level[..., None] > edges[:, :-1]).sum(dim=-1)


def _between_bounds(raw: Tensor) -> Tensor:
    """Map any number smoothly into (WIDEST, SHARPEST); near the middle by itself."""
    below = SHARPEST - functional.softplus(SHARPEST - raw)
    return WIDEST + functional.softplus(below - WIDEST)
