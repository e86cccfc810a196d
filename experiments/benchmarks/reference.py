"""The reference recipe, written plainly: what the other benchmarks measure against.

Raw float32 rows in a TensorDataset, a shuffling DataLoader of 64, Adam at 1e-3, the velocity a - x_0 at
x_t = (1 - t) x_0 + t a with t uniform, no normalisation; prediction by 100 Euler steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
NUM_STEPS = 100
FREQUENCY_STD = 16.0


class FourierFeatures(nn.Module):
    """[sin, cos](2 pi w t) with trainable w drawn from N(0, 16^2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.frequency = nn.Parameter(torch.randn(dim // 2) * FREQUENCY_STD)

    def forward(self, t: Tensor) -> Tensor:
        """Map (batch, 1) to (batch, dim)."""
        angle = 2.0 * math.pi * t * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def block(dim_in: int, dim_out: int) -> nn.Sequential:
    """Return LayerNorm, Linear, SiLU, LayerNorm, Linear, LayerNorm."""
    return nn.Sequential(
        nn.LayerNorm(dim_in),
        nn.Linear(dim_in, dim_out),
        nn.SiLU(),
        nn.LayerNorm(dim_out),
        nn.Linear(dim_out, dim_out),
        nn.LayerNorm(dim_out),
    )


class ReferenceNetwork(nn.Module):
    """The velocity network: an encoder and a decoder over widths, with skips and a projection of (t, c) per level."""

    def __init__(
        self, action_dim: int, condition_dim: int, embed_dim: int = 16, down_dims: Sequence[int] = (16, 32, 64)
    ):
        super().__init__()
        e, widths = embed_dim, list(down_dims)
        self.time = nn.Sequential(
            FourierFeatures(e),
            nn.Linear(e, 4 * e),
            nn.Mish(),
            nn.LayerNorm(4 * e),
            nn.Linear(4 * e, e),
            nn.LayerNorm(e),
        )
        self.condition = nn.Sequential(
            nn.Linear(condition_dim, e), nn.SiLU(), nn.LayerNorm(e), nn.Linear(e, e), nn.LayerNorm(e)
        )
        self.projections = nn.ModuleList(nn.Linear(e, width) for width in widths)
        self.enter = nn.Sequential(nn.Linear(action_dim, widths[0]), nn.LayerNorm(widths[0]))
        inputs = [widths[0], *widths[:-1]]
        self.encoder = nn.ModuleList(block(d_in + d, d) for d_in, d in zip(inputs, widths, strict=True))
        above = [*widths[1:], widths[-1]]
        self.decoder = nn.ModuleList(block(up + d + d, d) for up, d in zip(above, widths, strict=True))
        self.leave = nn.Sequential(nn.LayerNorm(widths[0]), nn.Linear(widths[0], action_dim))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Map x (batch, action_dim), t (batch, 1) and [s, s'] to the velocity (batch, action_dim)."""
        embedding = self.time(t) + self.condition(condition)
        projections = [project(embedding) for project in self.projections]
        h = self.enter(x)
        skips = []
        for layer, projection in zip(self.encoder, projections, strict=True):
            h = layer(torch.cat([h, projection], dim=1))
            skips.append(h)
        for layer, skip, projection in reversed(list(zip(self.decoder, skips, projections, strict=True))):
            h = layer(torch.cat([h, skip, projection], dim=1))
        return self.leave(h)


class ReferenceLoop:
    """The network with its loader and optimizer."""

    def __init__(self, state: Tensor, action: Tensor, next_state: Tensor, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.network = ReferenceNetwork(action.shape[1], 2 * state.shape[1]).to(self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.loader = DataLoader(TensorDataset(state, action, next_state), batch_size=BATCH_SIZE, shuffle=True)
        self.batches = iter(self.loader)

    def train(self, num_steps: int) -> None:
        """Take optimizer steps."""
        for _ in range(num_steps):
            state, action, next_state = self._next_batch()
            x_0 = torch.randn_like(action)
            t = torch.rand(len(action), 1, device=self.device)
            velocity = self.network((1 - t) * x_0 + t * action, t, torch.cat([state, next_state], dim=1))
            loss = nn.functional.mse_loss(velocity, action - x_0)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    @torch.no_grad()
    def sample(self, state: Tensor, next_state: Tensor, num_steps: int = NUM_STEPS) -> Tensor:
        """Predict actions (batch, action_dim) by Euler steps from t = 0 to 1."""
        condition = torch.cat([state, next_state], dim=1)
        x = torch.randn(len(state), self.network.enter[0].in_features, device=self.device)
        for i in range(num_steps):
            x = x + self.network(x, torch.full((len(x), 1), i / num_steps, device=self.device), condition) / num_steps
        return x

    def _next_batch(self) -> list[Tensor]:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return [tensor.to(self.device) for tensor in batch]
