"""The features of a transition, in torch: the same numbers as `invdyn.statistics.transition_features`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def transition_features(
    state: Float[Tensor, "batch window_dim"], next_state: Float[Tensor, "batch state_dim"]
) -> Float[Tensor, "batch features"]:
    """Return [s, past differences, s' - s] in float64.

    Args:
        state: (batch, (history + 1) * state_dim), oldest first, so its last `state_dim` columns are the current state.
        next_state: (batch, state_dim).

    Returns:
        (batch, (history + 2) * state_dim) float64: the current state, then s_t - s_{t-1} back to the oldest pair, then
        next_state - s_t.
    """
    state_dim = next_state.shape[1]
    window = state.double()
    current = window[:, -state_dim:]
    past = (window[:, state_dim:] - window[:, :-state_dim]).split(state_dim, dim=1)
    return torch.cat([current, *reversed(past), next_state.double() - current], dim=1)
