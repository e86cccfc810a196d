"""The features of a transition, in torch: the same numbers as `invdyn.statistics.transition_features`."""

from __future__ import annotations

from itertools import pairwise

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
    window = state.double().split(next_state.shape[1], dim=1)
    past = [after - before for before, after in pairwise(window)]
    return torch.cat([window[-1], *reversed(past), next_state.double() - window[-1]], dim=1)
