"""C2ST: can a classifier tell a model's actions from those of the exact posterior?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from invdyn.errors import DataError

FOLDS = 2
WIDTH = 64
STEPS = 1_000
BATCH_PAIRS = 256
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 1e-2
FEWEST_PAIRS = 50

Points = Float[np.ndarray, "pairs features"]


@dataclass(frozen=True)
class TwoSample:
    """What a classifier two-sample test found.

    Attributes:
        accuracy: of the classifier on pairs that it was not trained on: .5 when the samples cannot be told apart, 1
            when they always can.
        standard_error: of that accuracy for samples of one distribution: below .5 plus twice this, no difference is
            proven.
        pairs: how many pairs of samples.
    """

    accuracy: float
    standard_error: float
    pairs: int


def classifier_two_sample(first: Points, second: Points, seed: int = 0) -> TwoSample:
    """Train a small network to tell two sets of points apart, and return its cross-validated accuracy.

    Row i of both sets belongs together (an action of each for one transition), so both lie in the same fold: otherwise
    the classifier could remember the transition of one and guess the other. The folds are trained at once, each a
    slice of stacked weights. Features are standardised over both sets.

    Source: Lopez-Paz & Oquab, "Revisiting Classifier Two-Sample Tests" (2017).

    Args:
        first: (pairs, features), such as [transition, action of the model].
        second: (pairs, features), such as [the same transition, action of the exact posterior].
        seed: of the folds, the weights and the batches.

    Raises:
        DataError: with fewer than 50 pairs, or values that are not finite.
    """
    if first.shape != second.shape or len(first) < FEWEST_PAIRS:
        raise DataError(
            f"C2ST needs two sets of the same shape with {FEWEST_PAIRS} rows or more, got {first.shape} and "
            f"{second.shape}; evaluate more rows"
        )
    both = np.concatenate([first, second]).astype(np.float64)
    if not np.isfinite(both).all():
        raise DataError("C2ST needs finite values; the model's samples are not")
    std = both.std(axis=0)
    points = torch.from_numpy((both - both.mean(axis=0)) / np.where(std > 0, std, 1.0)).float()
    generator = torch.Generator().manual_seed(seed)
    correct = _cross_validate(points[: len(first)], points[len(first) :], generator)
    return TwoSample(float(correct), float(0.5 / np.sqrt(2 * len(first))), len(first))


def _cross_validate(first: Tensor, second: Tensor, generator: torch.Generator) -> float:
    """Return the share of held-out points that the classifiers of all folds name rightly."""
    per_fold = len(first) // FOLDS
    order = torch.randperm(len(first), generator=generator)[: per_fold * FOLDS].view(FOLDS, per_fold)
    train = torch.stack([order[torch.arange(FOLDS) != fold].flatten() for fold in range(FOLDS)])
    network = _FoldNetworks(first.shape[1], generator)
    _fit(network, first, second, train, generator)
    with torch.no_grad():
        scores = network(torch.cat([first[order], second[order]], dim=1))
    # A tie says nothing: half of it is right.
    named_second = (scores > 0).float() + 0.5 * (scores == 0).float()
    return float((1.0 - named_second[:, :per_fold]).mean() + named_second[:, per_fold:].mean()) / 2.0


def _fit(network: _FoldNetworks, first: Tensor, second: Tensor, train: Tensor, generator: torch.Generator) -> None:
    """Train every fold's network on its own rows, the learning rate falling to zero."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batch = min(BATCH_PAIRS, train.shape[1])
    label = torch.cat([torch.zeros(batch), torch.ones(batch)]).expand(FOLDS, -1)
    for _ in range(STEPS):
        picked = torch.randint(train.shape[1], (FOLDS, batch), generator=generator)
        rows = train.gather(1, picked)
        scores = network(torch.cat([first[rows], second[rows]], dim=1))
        loss = functional.binary_cross_entropy_with_logits(scores, label, reduction="sum") / label.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class _FoldNetworks(nn.Module):
    """One MLP per fold, with two hidden layers, as stacked weights."""

    def __init__(self, num_features: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = ((num_features, WIDTH), (WIDTH, WIDTH), (WIDTH, 1))
        self.weights = nn.ParameterList(
            torch.randn(FOLDS, *size, generator=generator) * (2.0 / size[0]) ** 0.5 for size in sizes
        )
        self.biases = nn.ParameterList(torch.zeros(FOLDS, 1, size[1]) for size in sizes)

    def forward(self, points: Float[Tensor, "folds batch features"]) -> Float[Tensor, "folds batch"]:
        """Return the evidence for the second set: above 0 means that."""
        hidden = points
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, functional.silu(hidden) if index else hidden, weight)
        return hidden.squeeze(-1)
