"""Predict in a recording's own dimensions with a model that was trained without the constant ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.errors import DataError
from invdyn.models.base import InverseDynamics, Noise

DimValues = Iterable[tuple[int, float]]


class WithConstantDims(InverseDynamics):
    """A model whose states and actions have dimensions that its own rows leave out because they never change.

    Constant dimensions of the state are ignored; those of the action are set to their recorded value.

    Args:
        inner: the model of the rows without those dimensions.
        state: (dimension, value) of each constant dimension of the recorded state.
        action: likewise of the action.
    """

    action_values: Tensor

    def __init__(self, inner: InverseDynamics, state: DimValues, action: DimValues) -> None:
        states, actions = dict(state), dict(action)
        state_dim, action_dim = inner.state_dim + len(states), inner.action_dim + len(actions)
        super().__init__(
            state_dim, action_dim, history=inner.history, horizon=inner.horizon, base="none", normalize=False
        )
        self.trainable = inner.trainable  # type: ignore[misc]
        self.state_kept = np.setdiff1d(np.arange(state_dim), list(states)).tolist()
        self.action_kept = np.setdiff1d(np.arange(action_dim), list(actions)).tolist()
        values = torch.zeros(action_dim)
        values[list(actions)] = torch.tensor(list(actions.values()))
        self.register_buffer("action_values", values)
        self.inner = inner

    @property
    def noise_dim(self) -> int:
        """Columns of the inner model's noise."""
        return self.inner.noise_dim

    def encode(
        self,
        state: Float[Tensor, "batch window_dim"],
        action: Float[Tensor, "batch *horizon action_dim"],
        next_state: Float[Tensor, "batch state_dim"],
    ) -> tuple[Float[Tensor, "batch context"], Float[Tensor, "batch target"]]:
        """Return what the inner model trains on; shapes as in `InverseDynamics.encode`."""
        return self.inner.encode(self._drop(state), action[..., self.action_kept], self._drop(next_state))

    def encode_transition(
        self, state: Float[Tensor, "batch window_dim"], next_state: Float[Tensor, "batch state_dim"]
    ) -> tuple[Float[Tensor, "batch context"], Float[Tensor, "batch target"]]:
        """Return the inner model's input and base prediction."""
        return self.inner.encode_transition(self._drop(state), self._drop(next_state))

    def decode(
        self, target: Float[Tensor, "samples batch target"], mean: Float[Tensor, "batch target"]
    ) -> Float[Tensor, "samples batch *horizon action_dim"]:
        """Return actions in physical units with all recorded dimensions."""
        varying = self.inner.decode(target, mean)
        action = self.action_values.expand(*varying.shape[:-1], self.action_dim).clone()
        action[..., self.action_kept] = varying
        return action

    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the inner model's loss."""
        return self.inner.encoded_loss(context, target, noise)

    def log_prob(
        self,
        state: Float[Tensor, "batch window_dim"],
        action: Float[Tensor, "batch *horizon action_dim"],
        next_state: Float[Tensor, "batch state_dim"],
    ) -> Float[Tensor, " batch"]:
        """Return the inner model's log density: that of the dimensions that vary."""
        return self.inner.log_prob(self._drop(state), action[..., self.action_kept], self._drop(next_state))

    def draw_noise(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Noise:
        """Draw the inner model's noise."""
        return self.inner.draw_noise(batch_size, generator, device)

    def _sample_targets(
        self,
        context: Float[Tensor, "batch context"],
        num_samples: int,
        num_inference_steps: int | None,
        solver: str | None,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "samples batch target"]:
        return self.inner._sample_targets(context, num_samples, num_inference_steps, solver, generator)

    def check_sampling(self, num_inference_steps: int | None, solver: str | None) -> None:
        """Refuse what the inner model refuses."""
        self.inner.check_sampling(num_inference_steps, solver)

    def _targets_from_noise(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        return self.inner._targets_from_noise(context, noise, num_inference_steps, solver)

    def _drop(self, state: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch kept"]:
        """Leave the constant dimensions out of one state, or of each state of a window.

        Raises:
            DataError: when the columns are no whole states.
        """
        if state.shape[-1] % self.state_dim:
            raise DataError(
                f"state and next_state must hold whole states of {self.state_dim} numbers, constant dimensions "
                f"included, got {tuple(state.shape)}; give all dimensions of the recording"
            )
        # Not len(): it would fix the batch size of an exported program.
        states = state.reshape(state.shape[0], -1, self.state_dim)
        return states[..., self.state_kept].reshape(state.shape[0], -1)
