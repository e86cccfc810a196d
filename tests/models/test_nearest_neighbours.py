from __future__ import annotations

import pytest
import torch

from invdyn.errors import ConfigError
from invdyn.models import NearestNeighbours, nearest_neighbours
from tests.models.rows import make_rows, moments_of


def fitted(num_neighbours: int, rows: int = 300) -> NearestNeighbours:
    data = make_rows(rows=rows)
    model = NearestNeighbours(3, 2, num_neighbours)
    model.fit_normalization(moments_of(data))
    model.fit(*model.encode(*data))
    return model


@pytest.mark.parametrize("chunk_elements", [1, 2**24])
def test_neighbours_are_the_nearest(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_neighbours, "_CHUNK_ELEMENTS", chunk_elements)
    model = fitted(5)
    query = torch.randn(40, model.context_dim, generator=torch.Generator().manual_seed(1))
    weight, found = model.neighbours(query)
    distance = torch.cdist(query.double(), model.row_context.double())
    expected = distance.sort(dim=1)
    assert torch.equal(found, expected.indices[:, :5])
    near = expected.values[:, :5]
    kernel = (-0.5 * (near / (near[:, -1:] / 2)).square()).exp()
    torch.testing.assert_close(weight.double(), kernel / kernel.sum(dim=1, keepdim=True), rtol=1e-3, atol=1e-5)


def test_samples_are_the_residuals_of_neighbours_by_their_weight() -> None:
    model = fitted(3)
    data = make_rows(rows=300)
    state, next_state = data.state[:20], data.next_state[:20]
    context, mean = model.encode_transition(state, next_state)
    weight, found = model.neighbours(context)
    samples = model.sample(state, next_state, 4000, generator=torch.Generator().manual_seed(0))
    choices = model.decode(model.row_target[found].transpose(0, 1), mean)  # (3, 20, 2)
    which = (samples[:, None] - choices).abs().sum(dim=-1)
    assert which.min(dim=1).values.max() < 1e-5
    share = torch.nn.functional.one_hot(which.argmin(dim=1), 3).double().mean(dim=0)
    torch.testing.assert_close(share, weight.double(), rtol=0, atol=0.03)


def test_one_neighbour_of_a_training_row_is_the_row_itself() -> None:
    model, data = fitted(1), make_rows(rows=300)
    torch.testing.assert_close(model.sample(data.state, data.next_state)[0], data.action, rtol=1e-5, atol=1e-5)


def test_fewer_rows_than_neighbours() -> None:
    data = make_rows(rows=4)
    model = fitted(10, rows=4)
    assert model.neighbours(model.encode_transition(data.state, data.next_state)[0])[0].shape == (4, 4)


def test_rows_that_coincide_share_the_weight() -> None:
    model = NearestNeighbours(1, 1, 4)
    model.fit(torch.zeros(6, 2), torch.arange(6.0)[:, None])
    weight, _ = model.neighbours(torch.zeros(1, 2))
    torch.testing.assert_close(weight, torch.full((1, 4), 0.25))


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="must be 1 or more, got 0 and 200000"):
        NearestNeighbours(2, 1, 0)
