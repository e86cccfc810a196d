"""The answer itself, where a simulator gives it: the exact inverse, or draws from the exact posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from invdyn.errors import ConfigError
from invdyn.models.base import InverseDynamics, Noise


class PhysicalOracle(InverseDynamics):
    """What no model of the recording can beat: MuJoCo's inverse of one step, in place of anything learned.

    For tasks with one right action it repeats the exact inverse (`invdyn.envs.inverse`); for those with several it
    draws from the exact posterior (`invdyn.envs.posterior`). Exact up to the rounding of float32 states; on joint
    limits and in contacts the rounding is amplified.

    Args:
        state_dim: size of one state, [qpos, qvel].
        action_dim: size of one action.
        env_id: Gymnasium id of the task.
        env_kwargs: arguments of the task.
        history: number of past states, which it ignores.
        horizon: must be 1.

    Raises:
        ConfigError: when the task has no exact inverse, or other dimensions.
    """

    trainable = False

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        *,
        env_id: str,
        env_kwargs: Mapping[str, Any] | None = None,
        history: int = 0,
        horizon: int = 1,
    ) -> None:
        super().__init__(state_dim, action_dim, history=history, horizon=horizon, base="none", normalize=False)
        from invdyn.envs.inverse import PhysicalInverse  # MuJoCo: imported only where it is needed
        from invdyn.envs.posterior import ActionPosterior, has_posterior

        if horizon != 1:
            raise ConfigError(f"PhysicalOracle inverts one step: horizon must be 1, got {horizon}")
        self.posterior = ActionPosterior(env_id, env_kwargs) if has_posterior(env_id, env_kwargs) else None
        self.inverse = None if self.posterior else PhysicalInverse(env_id, env_kwargs)
        exact = self.posterior or self.inverse
        assert exact is not None
        if (exact.state_dim, exact.action_dim) != (state_dim, action_dim):
            raise ConfigError(
                f"PhysicalOracle needs whole states [qpos, qvel] and actions: {env_id} has {exact.state_dim} and "
                f"{exact.action_dim} numbers, the dataset {state_dim} and {action_dim}"
            )

    @override
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of one prediction, always the same one; `noise` is empty."""
        generator = torch.Generator(context.device).manual_seed(0)
        return functional.mse_loss(self._sample_targets(context, 1, None, None, generator)[0], target)

    @override
    def _sample_targets(
        self,
        context: Float[Tensor, "batch context"],
        num_samples: int,
        num_inference_steps: int | None,
        solver: str | None,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "samples batch target"]:
        columns = context.cpu().numpy()
        state, next_state = columns[:, -2 * self.state_dim : -self.state_dim], columns[:, -self.state_dim :]
        if self.inverse is not None:
            actions = np.broadcast_to(self.inverse(state, next_state), (num_samples, len(state), self.action_dim))
        else:
            assert self.posterior is not None
            # The seed comes from torch, so that its generators decide the actions here too.
            seed = torch.randint(2**62, (), generator=generator, device=context.device)
            actions = self.posterior.sample(state, next_state, num_samples, np.random.default_rng(int(seed)))
        return torch.from_numpy(actions.astype(np.float32)).to(context.device)
