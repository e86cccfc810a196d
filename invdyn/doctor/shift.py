"""Whether the splits look like samples of one distribution, judged against other ways to split the same episodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from invdyn.doctor.findings import INFO, WARNING, Finding
from invdyn.doctor.values import Names
from invdyn.transitions.plan import SPLITS, TRAIN

BINS = 64
PERMUTATIONS = 400
ALARM_KS = 0.1
ALARM_P = 0.005
FEW_EPISODES = 8


@dataclass(frozen=True)
class Shift:
    """How a split differs from train.

    Attributes:
        split: name of the split.
        ks: (columns,) largest difference of the cumulative distributions, for states then actions.
        mean_difference: (columns,) difference of the means in standard deviations of all rows.
        p_value: share of random splits of the same episodes whose largest `ks` is at least as large.
        num_episodes: episodes of the split.
    """

    split: str
    ks: Float[np.ndarray, "columns"]
    mean_difference: Float[np.ndarray, "columns"]
    p_value: float
    num_episodes: int


def episode_histograms(
    values: Float[np.ndarray, "rows columns"], episode: Int[np.ndarray, "rows"], num_episodes: int
) -> Float[np.ndarray, "episodes columns bins"]:
    """Count each episode's rows in bins that hold about equally many rows of all episodes."""
    levels = np.linspace(0, 1, BINS + 1)[1:-1]
    counts = np.empty((num_episodes, values.shape[1], BINS))
    for index, column in enumerate(values.T):
        bins = np.searchsorted(np.quantile(column, levels), column, side="left")
        counts[:, index] = np.bincount(episode * BINS + bins, minlength=num_episodes * BINS).reshape(num_episodes, BINS)
    return counts


def kolmogorov_smirnov(
    counts: Float[np.ndarray, "episodes columns bins"],
    members: Float[np.ndarray, "ways episodes"],
    train: Float[np.ndarray, "ways episodes"],
) -> Float[np.ndarray, "ways columns"]:
    """Return the largest difference of the cumulative distributions of two sets of episodes, per way to choose.

    Args:
        counts: histograms of each episode.
        members: 1 for the episodes of the one set.
        train: 1 for those of the other.
    """
    flat = counts.reshape(len(counts), -1)

    def cumulative(chosen: Float[np.ndarray, "ways episodes"]) -> Float[np.ndarray, "ways columns bins"]:
        summed = (chosen @ flat).reshape(len(chosen), *counts.shape[1:])
        shares: Float[np.ndarray, "ways columns bins"] = np.cumsum(summed, axis=2) / summed.sum(axis=2, keepdims=True)
        return shares

    difference: Float[np.ndarray, "ways columns"] = np.abs(cumulative(members) - cumulative(train)).max(axis=2)
    return difference


def measure_shift(
    values: Float[np.ndarray, "rows columns"], episode: Int[np.ndarray, "rows"], split: Int[np.ndarray, "episodes"]
) -> list[Shift]:
    """Compare every other split with train.

    Rows of one episode resemble each other, so that a test which takes rows for independent raises an alarm for any
    split. Instead the episodes are dealt anew many times, and the largest difference over all columns is compared.
    """
    counts = episode_histograms(values, episode, len(split))
    std = values.std(axis=0)
    generator = np.random.default_rng(0)
    found = []
    for index, name in enumerate(SPLITS):
        involved = np.flatnonzero((split == index) | (split == TRAIN))
        if index == TRAIN or not (split == index).any() or not (split == TRAIN).any():
            continue
        mine = (split[involved] == index).astype(np.float64)
        dealt = generator.permuted(np.tile(mine, (PERMUTATIONS, 1)), axis=1)
        ways = np.concatenate([mine[None], dealt])
        ks = np.concatenate([kolmogorov_smirnov(counts[involved], w, 1 - w) for w in np.array_split(ways, 20)])
        largest = ks.max(axis=1)
        means = [values[np.isin(episode, involved[mine == side])].mean(axis=0) for side in (1, 0)]
        difference = np.divide(means[0] - means[1], std, where=std > 0, out=np.zeros_like(std))
        p_value = float((largest >= largest[0] - 1e-12).mean())
        found.append(Shift(name, ks[0], difference, p_value, int(mine.sum())))
    return found


def check_shift(names: Names, shifts: list[Shift]) -> list[Finding]:
    """Say which splits differ from train more than chance explains."""
    columns = (*names.state, *names.action)
    findings = []
    for shift in shifts:
        order = np.argsort(-shift.ks)[:3]
        worst = ", ".join(
            f"{columns[i]} (KS {shift.ks[i]:.2f}, mean {shift.mean_difference[i]:+.2f} std)" for i in order
        )
        few = shift.num_episodes < FEW_EPISODES
        if shift.ks.max() < ALARM_KS or (shift.p_value > ALARM_P and not few):
            continue
        chance = f"{shift.p_value:.1%} of random splits of these episodes differ as much"
        alarm = shift.p_value <= ALARM_P
        findings.append(
            Finding(
                check="split_shift",
                severity=WARNING if alarm else INFO,
                title=f"{shift.split} is distributed unlike train"
                if alarm
                else f"{shift.split} has few episodes ({shift.num_episodes}) and differs from train, as others would",
                evidence=f"largest differences: {worst}; {chance}",
                fix="change the name (it seeds the split), raise val_ratio or test_ratio, or mix the recordings before "
                "splitting; keep it where the difference is what you want to test"
                if alarm
                else "",
                figures={
                    "split": shift.split,
                    "ks": shift.ks.tolist(),
                    "mean_difference": shift.mean_difference.tolist(),
                    "p_value": shift.p_value,
                },
            )
        )
    return findings
