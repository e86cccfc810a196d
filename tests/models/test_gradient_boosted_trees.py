"""The trees are scikit-learn's; the arrays, and the walk through them, are ours."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch

from invdyn.errors import ConfigError
from invdyn.models import GradientBoostedTrees, gradient_boosted_trees
from tests.models.rows import make_rows, moments_of


@pytest.mark.parametrize(
    "options",
    [{"max_iter": 30}, {"max_iter": 7, "max_leaf_nodes": 3}, {"max_iter": 12, "min_samples_leaf": 1}],
    ids=str,
)
def test_predictions_equal_those_of_scikit_learn(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(3000, 6, generator=generator)
    target = torch.stack([context[:, 0].sin() * context[:, 1], (context[:, 2] > 0.3).float()], dim=1)
    model = GradientBoostedTrees(3, 2, base="none", **options)
    regressors = [model.regressor().fit(context.numpy(), column) for column in target.numpy().T]
    model.adopt(regressors)
    query = torch.cat([torch.randn(1000, 6, generator=generator) * 2, context[:500]])
    expected = np.stack([regressor.predict(query.numpy()) for regressor in regressors], axis=1)
    np.testing.assert_allclose(model.predict(query).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_values_on_a_threshold_go_left() -> None:
    """Features with few values: every threshold lies between two of them; queries exactly on thresholds."""
    context = torch.arange(400).remainder(4).float()[:, None].repeat(1, 2)
    target = context[:, :1].square()
    model = GradientBoostedTrees(1, 1, base="none", max_iter=5)
    regressor = model.regressor().fit(context.numpy(), target.numpy()[:, 0])
    model.adopt([regressor])
    inner = model.branches[0, :, :, 0] != torch.arange(model.branches.shape[2])
    thresholds = model.threshold[0][inner].unique()
    assert len(thresholds) >= 3
    query = torch.stack([thresholds, thresholds], dim=1)
    expected = regressor.predict(query.numpy())
    np.testing.assert_allclose(model._predict_chunk(query)[:, 0].numpy(), expected, rtol=1e-12)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows()
    model = GradientBoostedTrees(3, 2, max_iter=5)
    model.fit_normalization(moments_of(rows))
    model.fit(*model.encode(*rows))
    whole = model.sample(rows.state, rows.next_state)
    monkeypatch.setattr(gradient_boosted_trees, "_CHUNK_ELEMENTS", 1)
    assert torch.equal(model.sample(rows.state, rows.next_state), whole)


def test_fitting_again_gives_the_same_trees() -> None:
    rows = make_rows(rows=12_000)  # enough for scikit-learn to hold rows out, which draws
    states = []
    for _ in range(2):
        model = GradientBoostedTrees(3, 2, max_iter=10)
        model.fit_normalization(moments_of(rows))
        model.fit(*model.encode(*rows))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_fitting_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    rows = make_rows()
    model = GradientBoostedTrees(3, 2)
    with pytest.raises(ConfigError, match=r"need scikit-learn to be fitted; pip install 'invdyn\[trees\]'"):
        model.fit(*model.encode(*rows))
    assert model.sample(rows.state, rows.next_state).shape == (1, 256, 2)  # predicting needs none
