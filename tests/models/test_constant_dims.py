"""Constant dimensions are ignored in states and restored in actions."""

from __future__ import annotations

import pytest
import torch

from invdyn.errors import DataError
from invdyn.models.constant_dims import WithConstantDims
from invdyn.models.linear import LinearInverse
from invdyn.statistics import Moments


@pytest.mark.parametrize(("history", "horizon"), [(0, 1), (2, 3)])
def test_actions_are_those_of_the_inner_model_and_the_constants(history: int, horizon: int) -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(50, history + 1, 4, generator=generator)
    after = torch.randn(50, 4, generator=generator)
    shape = (50, horizon, 3) if horizon > 1 else (50, 3)
    action = torch.randn(shape, generator=generator)
    kept = full[..., [0, 2]].reshape(50, -1), action[..., [1]], after[:, [0, 2]]
    inner = LinearInverse(2, 1, history=history, horizon=horizon)
    inner.fit_normalization(Moments.of_transitions(*(values.numpy() for values in kept)))

    model = WithConstantDims(inner, [(1, 5.0), (3, 6.0)], [(0, -0.5), (2, 0.25)])
    predicted = model.sample(full.reshape(50, -1), after, 2)

    assert (model.state_dim, model.action_dim) == (4, 3)
    assert predicted.shape == (2, *shape)
    assert (predicted[..., 0] == -0.5).all()
    assert (predicted[..., 2] == 0.25).all()
    torch.testing.assert_close(predicted[..., [1]], inner.sample(kept[0], kept[2], 2), rtol=0, atol=0)
    noise = torch.randn(2, 50, model.noise_dim, generator=generator)
    assert noise.shape[-1] == inner.target_dim
    torch.testing.assert_close(model.sample_from(full.reshape(50, -1), after, noise), predicted, rtol=0, atol=0)
    torch.testing.assert_close(model.loss(full.reshape(50, -1), action, after), inner.loss(*kept), rtol=0, atol=0)
    with pytest.raises(DataError, match=r"^state and next_state must hold whole states of 4 numbers"):
        model.sample(full.reshape(50, -1)[:, :3], after)
