"""The interface of every inverse dynamics model, and the normalisation that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdyn.errors import ConfigError, DataError
from invdyn.models.features import transition_features
from invdyn.models.linear_base import normalization
from invdyn.statistics import Moments

BaseKind = Literal["linear", "none"]
Noise = tuple[Tensor, ...]


class InverseDynamics(nn.Module, ABC):
    """p(action | state, next_state): takes and returns physical units, normalises inside.

    `encode` turns physical transitions into (context, target), which is all that training reads: encode a dataset once,
    then call `encoded_loss` on slices of it. Until `fit_normalization` is called (or a state dict loaded), features and
    actions keep their units and there is no linear base.

    Args:
        state_dim: size of one state.
        action_dim: size of one action.
        history: number of past states that `state` holds before the current one.
        horizon: number of actions predicted.
        base: "linear" to model the residual of the ridge solution on [s, past differences, s' - s].
        normalize: standardise the features and whiten (or standardise) the targets. Without it the network sees the
            raw [state, next_state].
    """

    trainable: ClassVar[bool] = True
    is_point: ClassVar[bool] = False
    """Whether the prediction ignores the values of its noise, so that none need be drawn."""
    num_stages: int = 1
    stage: int = 0

    feature_mean: Tensor
    feature_inverse_std: Tensor
    action_mean: Tensor
    weight: Tensor
    target_scale: Tensor
    target_inverse: Tensor
    error_weight: Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        *,
        history: int = 0,
        horizon: int = 1,
        base: BaseKind = "linear",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.state_dim, self.action_dim = state_dim, action_dim
        self.history, self.horizon = history, horizon
        self.base: BaseKind = base
        self.normalize = normalize
        self.context_dim = (history + 2) * state_dim
        self.target_dim = horizon * action_dim
        self.register_buffer("feature_mean", torch.zeros(self.context_dim))
        self.register_buffer("feature_inverse_std", torch.ones(self.context_dim))
        self.register_buffer("action_mean", torch.zeros(self.target_dim))
        self.register_buffer("weight", torch.zeros(self.context_dim, self.target_dim))
        self.register_buffer("target_scale", torch.eye(self.target_dim))
        self.register_buffer("target_inverse", torch.eye(self.target_dim))
        self.register_buffer("error_weight", torch.eye(self.target_dim), persistent=False)  # of training alone

    @abstractmethod
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the training loss of encoded rows; the hot path of training.

        Args:
            context: (batch, context_dim), from `encode`.
            target: (batch, target_dim), from `encode`.
            noise: from `draw_noise`.
        """

    def enter_stage(self, stage: int) -> None:
        """Make the parameters that a stage of training trains require gradients, and no others.

        Args:
            stage: from 0 to `num_stages` - 1.
        """
        self.stage = stage

    def stage_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return what the current stage of training minimises; arguments as of `encoded_loss`, which is its last."""
        return self.encoded_loss(context, target, noise)

    def draw_noise(
        self,
        batch_size: int,  # noqa: ARG002
        generator: torch.Generator | None = None,  # noqa: ARG002
        device: torch.device | str | None = None,  # noqa: ARG002
    ) -> Noise:
        """Draw what `encoded_loss` needs at random, here nothing: tensors with a leading batch dimension."""
        return ()

    def _sample_targets(
        self,
        context: Float[Tensor, "batch context"],
        num_samples: int,
        num_inference_steps: int | None,
        solver: str | None,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "samples batch target"]:
        """Return targets (normalised residuals) for encoded contexts: by default those that drawn noise becomes."""
        shape = (num_samples, len(context), self.noise_dim)
        if self.is_point:
            noise = context.new_empty(shape)
        else:
            noise = torch.randn(shape, generator=generator, device=context.device)
        return self._targets_from_noise(context, noise, num_inference_steps, solver)

    def _target_log_prob(  # not abstract: most models have no density
        self,
        context: Float[Tensor, "batch context"],  # noqa: ARG002
        target: Float[Tensor, "batch target"],  # noqa: ARG002
    ) -> Float[Tensor, " batch"]:
        """Return the log density of float64 targets in nats, float64; models that have a density override this."""
        raise ConfigError(
            "log_prob needs a model with a density, which this one has not; use one that has, or compare samples "
            "(energy score)"
        )

    def _targets_from_noise(  # not abstract: some models draw in another way
        self,
        context: Float[Tensor, "batch context"],  # noqa: ARG002
        noise: Float[Tensor, "samples batch noise"],  # noqa: ARG002
        num_inference_steps: int | None,  # noqa: ARG002
        solver: str | None,  # noqa: ARG002
    ) -> Float[Tensor, "samples batch target"]:
        """Return the targets that noise becomes; a point model ignores its values."""
        raise ConfigError(
            f"the model must be a map from noise to actions (flows and point models are), {type(self).__name__} is "
            "none; use `sample`"
        )

    def check_sampling(self, num_inference_steps: int | None, solver: str | None) -> None:  # not abstract either
        """Refuse a way of sampling that the model was not validated with; models without a solver accept all."""

    def fit_normalization(self, moments: Moments) -> None:
        """Set the normalisation from the moments of [features, action] over the training rows.

        Raises:
            DataError: when the moments have other dimensions than the model, or are not finite.
        """
        if len(moments.mean) != self.context_dim + self.target_dim:
            raise DataError(
                f"the statistics must have {self.context_dim} features and {self.target_dim} action columns for "
                f"state_dim {self.state_dim}, action_dim {self.action_dim}, history {self.history}, horizon "
                f"{self.horizon}; got {len(moments.mean)} columns; build the model with the dimensions of the dataset"
            )
        fitted = normalization(
            moments, self.context_dim, linear_base=self.base == "linear", scale_targets=self.normalize
        )
        for name, values in vars(fitted).items():
            getattr(self, name).copy_(torch.from_numpy(values))

    def squared_error(
        self, prediction: Float[Tensor, "batch target"], target: Float[Tensor, "batch target"]
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of a regression, its directions weighed."""
        return self.weighed_error(prediction, target).square().mean()

    def weighed_error(
        self, prediction: Float[Tensor, "batch target"], target: Float[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target"]:
        """Return the error of a regression, its directions weighed: see `Normalization.error_weight`."""
        error = prediction - target
        return error if self.target_dim == 1 else error @ self.error_weight

    def encode(
        self,
        state: Float[Tensor, "batch window_dim"],
        action: Float[Tensor, "batch *horizon action_dim"],
        next_state: Float[Tensor, "batch state_dim"],
    ) -> tuple[Float[Tensor, "batch context"], Float[Tensor, "batch target"]]:
        """Return what the network trains on, in float32: its inputs and the normalised residual of the action.

        Args:
            state: (batch, (history + 1) * state_dim), oldest first, physical units.
            action: (batch, action_dim), or (batch, horizon, action_dim) when horizon > 1, physical units.
            next_state: (batch, state_dim), physical units.

        Raises:
            DataError: when a shape does not fit the model.
        """
        context, mean = self.encode_transition(state, next_state)
        return context, self._encode_action(action, mean).float()

    def _encode_action(
        self, action: Float[Tensor, "batch *horizon action_dim"], mean: Float[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target"]:
        """Return the normalised residual of the action in float64, given the base prediction."""
        if action.shape[0] != len(mean) or action[0:1].numel() != self.target_dim * min(1, len(action)):
            raise DataError(
                f"action must be {(len(mean), *self.action_shape)}, got {tuple(action.shape)}; "
                "use the dataset that the model was built for"
            )
        residual = action.reshape(len(mean), self.target_dim).double() - mean
        return residual @ self.target_inverse.double().T

    def encode_transition(
        self, state: Float[Tensor, "batch window_dim"], next_state: Float[Tensor, "batch state_dim"]
    ) -> tuple[Float[Tensor, "batch context"], Float[Tensor, "batch target"]]:
        """Return the network's input (float32) and the base prediction of the action (float64, physical units).

        Raises:
            DataError: when a shape does not fit the model.
        """
        if not all(isinstance(values, Tensor) for values in (state, next_state)):
            found = f"{type(state).__name__} and {type(next_state).__name__}"
            raise DataError(f"state and next_state must be tensors, got {found}; use torch.from_numpy")
        window_dim = (self.history + 1) * self.state_dim
        # Not len(): it would fix the batch size of an exported program.
        if state.shape[1:] != (window_dim,) or next_state.shape != (state.shape[0], self.state_dim):
            raise DataError(
                f"state and next_state must be (batch, {window_dim}) and (batch, {self.state_dim}), got "
                f"{tuple(state.shape)} and {tuple(next_state.shape)}; use the dataset that the model was built for"
            )
        features = transition_features(state, next_state)
        standardised = (features - self.feature_mean.double()) * self.feature_inverse_std.double()
        mean = self.action_mean.double() + standardised @ self.weight.double()
        context = standardised if self.normalize else torch.cat([state, next_state], dim=1)
        return context.float(), mean

    def decode(
        self, target: Float[Tensor, "samples batch target"], mean: Float[Tensor, "batch target"]
    ) -> Float[Tensor, "samples batch *horizon action_dim"]:
        """Return actions in physical units (float32) from targets and the base prediction of `encode_transition`."""
        action = mean + target.double() @ self.target_scale.double().T
        return action.float().reshape(*target.shape[:-1], *self.action_shape)

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of the action of one row: (action_dim,), or (horizon, action_dim) when horizon > 1."""
        return (self.horizon, self.action_dim) if self.horizon > 1 else (self.action_dim,)

    @property
    def noise_dim(self) -> int:
        """Columns of the noise that `sample_from` takes."""
        return self.target_dim

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.feature_mean.device

    def loss(
        self,
        state: Float[Tensor, "batch window_dim"],
        action: Float[Tensor, "batch *horizon action_dim"],
        next_state: Float[Tensor, "batch state_dim"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the training loss of physical transitions; shapes as in `encode`.

        Raises:
            DataError: when a shape does not fit the model.
        """
        context, target = self.encode(state, action, next_state)
        return self.encoded_loss(context, target, self.draw_noise(len(state), generator, context.device))

    def forward(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], *noise: Tensor
    ) -> Float[Tensor, ""]:
        """Return `stage_loss`: DistributedDataParallel and torch.compile wrap `forward`."""
        return self.stage_loss(context, target, noise)

    @torch.no_grad()
    def sample(
        self,
        state: Float[Tensor, "batch window_dim"],
        next_state: Float[Tensor, "batch state_dim"],
        num_samples: int = 1,
        *,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        generator: torch.Generator | None = None,
        allow_unvalidated: bool = False,
    ) -> Float[Tensor, "samples batch *horizon action_dim"]:
        """Draw actions for each transition; a point model repeats its prediction.

        Args:
            state: (batch, (history + 1) * state_dim), oldest first, physical units.
            next_state: (batch, state_dim), physical units.
            num_samples: actions per transition.
            num_inference_steps: solver steps; None for the model's own number.
            solver: name of the solver; None for the model's own.
            generator: source of randomness, on the model's device; the same seed gives the same actions.
            allow_unvalidated: accept a solver and number of steps that a checkpoint was not validated with.

        Returns:
            (num_samples, batch, [horizon,] action_dim) float32, physical units.

        Raises:
            DataError: when a shape does not fit the model.
            ConfigError: when the number of samples or steps is below 1, the solver is unknown, or the checkpoint that
                the model was loaded from was not validated with them.
        """
        if num_samples < 1:
            raise ConfigError(f"num_samples must be 1 or more, got {num_samples}")
        if not allow_unvalidated:
            self.check_sampling(num_inference_steps, solver)
        context, mean = self.encode_transition(state, next_state)
        return self.decode(self._sample_targets(context, num_samples, num_inference_steps, solver, generator), mean)

    def sample_from(
        self,
        state: Float[Tensor, "batch window_dim"],
        next_state: Float[Tensor, "batch state_dim"],
        noise: Float[Tensor, "samples batch noise"],
        *,
        num_inference_steps: int | None = None,
        solver: str | None = None,
    ) -> Float[Tensor, "samples batch *horizon action_dim"]:
        """Return the actions that given noise becomes: `sample` without its draw, differentiable and exportable.

        Args:
            state: as in `sample`.
            next_state: as in `sample`.
            noise: (num_samples, batch, noise_dim) of N(0, I); a point model ignores its values.
            num_inference_steps: as in `sample`.
            solver: as in `sample`.

        Returns:
            (num_samples, batch, [horizon,] action_dim) float32, physical units.

        Raises:
            DataError: when a shape does not fit the model.
            ConfigError: when the model has no map from noise to actions, the number of steps is below 1, or the solver
                is unknown.
        """
        context, mean = self.encode_transition(state, next_state)
        return self.decode(self._targets_from_noise(context, noise, num_inference_steps, solver), mean)

    def log_prob(
        self,
        state: Float[Tensor, "batch window_dim"],
        action: Float[Tensor, "batch *horizon action_dim"],
        next_state: Float[Tensor, "batch state_dim"],
    ) -> Float[Tensor, " batch"]:
        """Return ln p(action | state, next_state) in nats, a density per unit of the action; shapes as in `encode`.

        Returns:
            (batch,) float64.

        Raises:
            DataError: when a shape does not fit the model.
            ConfigError: when the model has no density, or an action that never varies makes it infinite.
        """
        context, mean = self.encode_transition(state, next_state)
        log_density = self._target_log_prob(context, self._encode_action(action, mean))
        sign: Tensor
        log_volume: Tensor
        sign, log_volume = torch.linalg.slogdet(self.target_inverse.double())
        if not sign:
            constant = (self.target_inverse.diagonal() == 0).nonzero().flatten().tolist()
            raise ConfigError(
                f"log_prob needs actions that vary: of the training rows, dimensions {constant} are constant; extract "
                "them with the filter drop_constant_dims"
            )
        return log_density + log_volume
