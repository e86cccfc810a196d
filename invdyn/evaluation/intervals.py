"""How sure a number is: a bootstrap over episodes, and the spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

CONFIDENCE = 0.95
REPLICATES = 500
FEWEST_EPISODES = 2

PerRow = Float[np.ndarray, " rows"]


@dataclass(frozen=True)
class Interval:
    """A confidence interval of 95%."""

    low: float
    high: float


@dataclass(frozen=True)
class OverSeeds:
    """A number measured once per seed.

    Attributes:
        mean: over the seeds.
        std: sample standard deviation; NaN for one seed.
        low: smallest.
        high: largest.
        seeds: how many.
    """

    mean: float
    std: float
    low: float
    high: float
    seeds: int


class EpisodeBootstrap:
    """Confidence intervals of means over rows, by drawing whole episodes with repetition.

    Rows of one episode are alike, so drawing single rows would promise far too narrow intervals. All intervals use the
    same draws: what is drawn depends on the episodes and the seed alone.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), percentile interval, sec. 13.3; clusters as
    units, Davison & Hinkley, "Bootstrap Methods and their Application" (1997), sec. 3.8.

    Args:
        episode: (rows,) the episode of each row.
        seed: of the draws.
        replicates: how many draws.
    """

    def __init__(self, episode: Int[np.ndarray, " rows"], seed: int = 0, replicates: int = REPLICATES) -> None:
        names, self._index = np.unique(episode, return_inverse=True)
        self.num_episodes = len(names)
        self._sizes = np.bincount(self._index, minlength=self.num_episodes)
        generator = np.random.default_rng(seed)
        shares = np.full(self.num_episodes, 1.0 / self.num_episodes)
        self._weights = generator.multinomial(self.num_episodes, shares, size=replicates).astype(np.float32)

    def interval(
        self, rows: PerRow, transform: Callable[[Float[np.ndarray, " n"]], Float[np.ndarray, " n"]] = np.asarray
    ) -> Interval | None:
        """Return the interval of transform(mean of `rows`); None with a single episode or values that are not finite.

        Args:
            rows: (rows,) one value per row, such as a squared error.
            transform: monotonous, applied to the mean: `np.sqrt` for an RMSE.
        """
        if self.num_episodes < FEWEST_EPISODES or not np.isfinite(rows).all():
            return None
        sums = np.bincount(self._index, weights=rows, minlength=self.num_episodes)
        means = transform((self._weights @ sums) / (self._weights @ self._sizes))
        low, high = np.quantile(means, ((1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0))
        return Interval(float(low), float(high))


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Summarise a number measured once per seed; at least one.

    Example:
        >>> over_seeds([1.0, 2.0, 3.0])
        OverSeeds(mean=2.0, std=1.0, low=1.0, high=3.0, seeds=3)
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return OverSeeds(float(np.mean(values)), std, float(min(values)), float(max(values)), len(values))
