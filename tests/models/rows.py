"""Small synthetic transitions whose inverse is known, and the moments that the models are fitted on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from invdyn.statistics import Moments, transition_features


class Rows(NamedTuple):
    state: Tensor
    action: Tensor
    next_state: Tensor


def make_rows(
    state_dim: int = 3, action_dim: int = 2, history: int = 0, horizon: int = 1, rows: int = 256, seed: int = 0
) -> Rows:
    """Transitions s' = s + mixed (action + 0.1 sin(3 action)) + a disturbance that no action explains."""
    random = np.random.default_rng(seed)
    state = random.normal(size=(rows, (history + 1) * state_dim))
    action = random.normal(size=(rows, horizon * action_dim))
    mixing = random.normal(size=(horizon * action_dim, state_dim))
    disturbance = 0.1 * random.normal(size=(rows, state_dim))
    next_state = state[:, -state_dim:] + (action + 0.1 * np.sin(3 * action)) @ mixing + disturbance
    shape = (rows, horizon, action_dim) if horizon > 1 else (rows, action_dim)
    arrays = (state, action.reshape(shape), next_state)
    return Rows(*(torch.from_numpy(array.astype(np.float32)) for array in arrays))


def moments_of(rows: Rows) -> Moments:
    state, action, next_state = (tensor.numpy() for tensor in rows)
    features = transition_features(state, next_state)
    return Moments.of_rows(np.concatenate([features, action.reshape(len(action), -1).astype(np.float64)], axis=1))
