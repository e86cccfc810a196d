"""How sure a number is: a bootstrap over episodes, and the spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int

CONFIDENCE = 0.95
REPLICATES = 500
FEWEST_EPISODES = 5
"""Of fewer, the bootstrap knows too little: from 3 episodes, intervals called 95% would hold the truth 3 times in 4."""

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

    Few episodes spread less than what they are drawn from, so the interval is the expanded percentile interval: its
    quantiles lie further out, as far as those of Student's t do.

    Source: Hesterberg, "What Teachers Should Know about the Bootstrap" (2015); clusters as units, Davison &
    Hinkley, "Bootstrap Methods and their Application" (1997), sec. 3.8.

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
        """Return the interval of transform(mean of `rows`); None with few episodes or values that are not finite.

        Args:
            rows: (rows,) one value per row, such as a squared error.
            transform: monotonous, applied to the mean: `np.sqrt` for an RMSE.
        """
        if self.num_episodes < FEWEST_EPISODES or not np.isfinite(rows).all():
            return None
        sums = np.bincount(self._index, weights=rows, minlength=self.num_episodes)
        means = transform((self._weights @ sums) / (self._weights @ self._sizes))
        tail = _expanded_tail(self.num_episodes)
        low, high = np.quantile(means, (tail, 1.0 - tail))
        return Interval(float(low), float(high))


def _expanded_tail(count: int) -> float:
    """Return the share of the replicates to leave out on each side, for an interval from `count` episodes.

    Source: for the quantile of Student's t, Abramowitz & Stegun, "Handbook of Mathematical Functions" (1964), 26.7.5.

    Example:
        >>> round(_expanded_tail(10), 4), round(_expanded_tail(10**9), 4)
        (0.0086, 0.025)
    """
    normal, freedom = NormalDist(), count - 1
    z = normal.inv_cdf((1.0 - CONFIDENCE) / 2.0)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return normal.cdf(t * (count / freedom) ** 0.5)


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Summarise a number measured once per seed; at least one.

    Example:
        >>> over_seeds([1.0, 2.0, 3.0])
        OverSeeds(mean=2.0, std=1.0, low=1.0, high=3.0, seeds=3)
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return OverSeeds(float(np.mean(values)), std, float(min(values)), float(max(values)), len(values))
