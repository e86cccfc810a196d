"""Identifiability: how much of each action the states of a row leave open, and which window would leave less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from invdyn.doctor.dynamics import Rows, fit_folds, make_rows, mean_share, per_action, unexplained
from invdyn.doctor.findings import INFO, WARNING, Finding
from invdyn.doctor.lag import FIRST_SHIFT, LAST_SHIFT
from invdyn.doctor.neighbours import unexplained_by_neighbours
from invdyn.doctor.sample import Sample
from invdyn.doctor.values import Names
from invdyn.evaluation.findings import list_dims
from invdyn.transitions.windows import Window

GAPS = (1, 2, 3, 4, 5, 6, 8)
HISTORIES = (0, 1, 2, 3)
ROWS_PER_FEATURE = 5
KEPT_SHARE = 0.5
"""A shorter reach is taken where the longest windows would leave fewer of the rows than this."""

MUCH_OPEN = 0.1
WORTHWHILE = ((0.1, 1.5), (0.01, 3.0), (1e-4, 10.0))
"""Another window is advised where this share is open and it leaves less by this factor."""

AS_GOOD_AS_EXACT = 1e-5
"""Shares below this (0.3% of the standard deviation) are not told apart."""

NEARLY_BEST = 1.2
"""Among windows whose rest is within this factor of the least, the smallest is advised."""


@dataclass(frozen=True)
class Identifiability:
    """What windows leave open.

    Attributes:
        window: the configured one.
        linear: share of each action dimension's variance that the linear inverse leaves; NaN for constant ones.
        neighbours: the same with the residual of the nearest rows.
        grid: mean share by (gap, history): of the better estimate of each dimension.
        num_rows: rows looked at.
        num_features: features of the configured window.
    """

    window: Window
    linear: Sequence[float]
    neighbours: Sequence[float]
    grid: dict[tuple[int, int], float]
    num_rows: int
    num_features: int

    @property
    def best_per_dim(self) -> Float[np.ndarray, "action_dim"]:
        """The smaller of the two shares of each dimension."""
        return np.fmin(self.linear, self.neighbours)

    @property
    def configured(self) -> float:
        """Mean share that the configured window leaves."""
        return self.grid[self.window.gap, self.window.history]

    @property
    def advised(self) -> tuple[int, int]:
        """(gap, history) of the smallest window that leaves nearly as little as any in the grid."""
        least = max(min(self.grid.values()), AS_GOOD_AS_EXACT)
        good = [key for key, share in self.grid.items() if share <= NEARLY_BEST * least]
        return min(good, key=lambda key: (key[0] + key[1], key[1]))


def rows_around(sample: Sample, window: Window) -> Rows | None:
    """Return rows that reach as far as shifts and grid ask, or as the episodes allow; None where there are none."""
    wanted = int(window.num_rows(sample.num_states, sample.num_actions).sum())
    past = max(-FIRST_SHIFT, window.history)
    for reach in (LAST_SHIFT + 1, 5, 3, 2, 1):
        before = min(past, max(reach, window.history))
        longest = Window(max(reach, window.gap), window.horizon, before)
        if longest.num_rows(sample.num_states, sample.num_actions).sum() >= KEPT_SHARE * wanted or reach == 1:
            break
    near = range(-before, reach + 1)
    return make_rows(sample, {*near, *range(-window.history, 0), window.gap}, window.horizon)


def measure_identifiability(rows: Rows, window: Window, action_dim: int) -> Identifiability:
    """Estimate what the configured window leaves open, and a small grid of others, all on the same rows."""
    gaps = sorted({window.gap, *(gap for gap in GAPS if gap in rows.offsets)})
    histories = sorted({window.history, *(h for h in HISTORIES if -h in rows.offsets)})
    grid = {}
    linear = neighbours = np.full(rows.num_targets, np.nan)
    for gap in gaps:
        for history in histories:
            blocks = rows.window_blocks(Window(gap, window.horizon, history))
            folds = fit_folds(rows, blocks)
            estimates = unexplained(rows, folds), unexplained_by_neighbours(rows, blocks, folds)
            grid[gap, history] = mean_share(np.fmin(*estimates))
            if (gap, history) == (window.gap, window.history):
                linear, neighbours = estimates
    return Identifiability(
        window=window,
        linear=per_action(linear, action_dim),
        neighbours=per_action(neighbours, action_dim),
        grid=grid,
        num_rows=len(rows.values),
        num_features=(window.history + 2) * rows.state_dim,
    )


def check_identifiability(found: Identifiability, names: Names) -> list[Finding]:
    """Say how much of the action is open, and which gap or history would leave less."""
    share = found.configured
    if not np.isfinite(share):
        return []
    figures: dict[str, object] = {
        "unexplained": share,
        "linear": list(found.linear),
        "neighbours": list(found.neighbours),
        "grid": [
            {"gap": gap, "history": history, "unexplained": value} for (gap, history), value in found.grid.items()
        ],
    }
    here = f"gap {found.window.gap} and history {found.window.history}"
    if found.num_rows < ROWS_PER_FEATURE * found.num_features:
        return [
            Finding(
                check="identifiability",
                severity=INFO,
                title="too few rows to say how well the states tell the action",
                evidence=f"{found.num_rows:,} rows for {found.num_features} features",
                figures=figures,
            )
        ]
    open_dims = [
        (value, name) for value, name in zip(found.best_per_dim, names.action, strict=True) if value > MUCH_OPEN
    ]
    evidence = f"linear inverse {mean_share(np.array(found.linear)):.3g}, with nearest neighbours "
    evidence += f"{mean_share(np.array(found.neighbours)):.3g} of the variance, mean over the dimensions"
    if open_dims:
        listed = [f"{name} {value:.2g}" for value, name in sorted(open_dims, reverse=True)]
        evidence += f"; most open: {list_dims(listed, limit=4)}"
    gap, history = found.advised
    least = found.grid[gap, history]
    better = any(share > open_share and share >= gain * least for open_share, gain in WORTHWHILE)
    advice = f"gap: {gap}, history: {history}" if better else ""
    if better:
        evidence += f"; gap {gap} and history {history} leave {least:.3g}"
    elif share > MUCH_OPEN:
        evidence += (
            "; no gap up to 8 or history up to 3 leaves clearly less: add what is missing to the state (contacts, "
        )
        evidence += "targets, velocities), or expect a distribution rather than one action"
    return [
        Finding(
            check="identifiability",
            severity=WARNING if better or share > MUCH_OPEN else INFO,
            title=f"{here} leave {percent(share)} of the action's variance unexplained"
            + (f"; gap {gap} and history {history} would leave {percent(least)}" if better else ""),
            evidence=evidence,
            fix=advice,
            figures=figures,
        )
    ]


def percent(share: float) -> str:
    """Return a share as text."""
    return f"{100 * share:.3g}%" if share >= 1e-6 else "under 0.0001%"
