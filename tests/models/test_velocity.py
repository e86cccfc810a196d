from __future__ import annotations

import pytest
import torch
from torch.nn import LayerNorm, Linear

from invdyn.errors import ConfigError
from invdyn.models import FlowInverseDynamics
from invdyn.models.velocity import NETWORKS, NetworkKind, TimeFeatures, UNetVelocity


def test_the_reference_network_has_its_number_of_parameters() -> None:
    model = FlowInverseDynamics(4, 1, 16, (16, 32, 64), base="none", normalize=False)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 43_609


def test_the_reference_network_has_its_layers() -> None:
    network = UNetVelocity(dim=1, context_dim=8, embed_dim=16, widths=(16, 32, 64))
    shapes = [(layer.in_features, layer.out_features) for layer in network.encoder.modules() if type(layer) is Linear]
    assert shapes == [(32, 16), (16, 16), (48, 32), (32, 32), (96, 64), (64, 64)]
    shapes = [(layer.in_features, layer.out_features) for layer in network.decoder.modules() if type(layer) is Linear]
    assert shapes == [(64, 16), (16, 16), (128, 32), (32, 32), (192, 64), (64, 64)]
    assert sum(type(layer) is LayerNorm for layer in network.modules()) == 2 + 2 + 1 + 3 * 6 + 1
    assert network.projection.out_features == 16 + 32 + 64
    torch.manual_seed(0)
    assert UNetVelocity(1, 8, 4096, (4,)).frequencies.std().item() == pytest.approx(16.0, rel=0.05)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_split_for_sampling_equals_the_plain_forward(network: NetworkKind) -> None:
    torch.manual_seed(0)
    net = NETWORKS[network](dim=2, context_dim=6, embed_dim=8, widths=(16, 16))
    x, context = torch.randn(3, 5, 2), torch.randn(5, 6)
    embedded = net.embed_context(context)
    for t in (0.0, 0.37, 0.9):
        split = net.combine(x, embedded + net.embed_time(torch.full((1, 1), t)))
        for sample in range(3):
            plain = net(x[sample], torch.full((5, 1), t), context)
            torch.testing.assert_close(split[sample], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_context_work_is_done_once_per_transition_and_call(
    network: NetworkKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FlowInverseDynamics(3, 2, 4, (8, 8), network=network)
    seen: list[int] = []
    embed = model.network.embed_context

    def counting(context: torch.Tensor) -> torch.Tensor:
        seen.append(len(context))
        return embed(context)

    monkeypatch.setattr(model.network, "embed_context", counting)
    model.sample(torch.randn(7, 3), torch.randn(7, 3), 5, num_inference_steps=6)
    assert seen == [7]


def test_time_features_are_low_frequencies() -> None:
    time = TimeFeatures(8)
    expected = torch.pi * torch.tensor([1.0, 2.0, 4.0, 8.0])
    torch.testing.assert_close(time.frequencies[:4], expected)
    features = time(torch.tensor([[0.25]]))
    torch.testing.assert_close(features, torch.cat([(0.25 * expected).sin(), (0.25 * expected).cos()])[None])


def test_the_blocks_of_film_have_one_width() -> None:
    with pytest.raises(ConfigError, match=r"down_dims of network film must all be equal, got \[8, 12\]"):
        FlowInverseDynamics(3, 2, 4, (8, 12), network="film")
