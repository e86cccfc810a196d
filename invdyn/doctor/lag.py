"""Action lag: which step the action of a row explains best."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Bool, Float, Int

from invdyn.doctor.dynamics import Rows, fit_folds, unexplained, unexplained_by_one_state
from invdyn.doctor.findings import WARNING, Finding
from invdyn.doctor.values import Names
from invdyn.evaluation.findings import list_dims
from invdyn.transitions.windows import Window

FIRST_SHIFT, LAST_SHIFT = -3, 8
EXPLAINED = 0.8
"""A dimension of which even the best shift leaves more than this has no lag to speak of."""

IMPROVEMENT = 0.8
"""A lag counts where it leaves less than this share of what the row's own step leaves."""


@dataclass(frozen=True)
class Lag:
    """How much of the action each shift leaves unexplained.

    Attributes:
        shifts: the steps tried, relative to the row.
        unexplained: (shifts, action_dim) share of the variance; NaN for constant dimensions.
        best: (action_dim,) shift that leaves least; -99 for a dimension that no shift explains.
        at_edge: (action_dim,) whether that is the last or first shift tried, so that the true one may lie beyond.
    """

    shifts: tuple[int, ...]
    unexplained: Float[np.ndarray, "shifts action_dim"]
    best: Int[np.ndarray, "action_dim"]
    at_edge: Bool[np.ndarray, "action_dim"]

    @property
    def lagging(self) -> Bool[np.ndarray, "action_dim"]:
        """Which dimensions explain another step than the row's own."""
        return np.asarray((self.best != 0) & (self.best != UNKNOWN))

    @property
    def steps(self) -> int:
        """The lag of the recording: the median of the dimensions that lag, where at least half of them do; else 0.

        Dimensions whose best shift is the last one tried only count where there are no others.
        """
        if 2 * self.lagging.sum() < max((self.best != UNKNOWN).sum(), 1):
            return 0
        inside = self.best[self.lagging & ~self.at_edge]
        lags = np.sort(inside if len(inside) else self.best[self.lagging])
        steps = int(lags[(len(lags) - 1) // 2])
        curve = self.mean_curve
        return steps if curve[self.shifts.index(steps)] < IMPROVEMENT * curve[self.shifts.index(0)] else 0

    @property
    def mean_curve(self) -> Float[np.ndarray, "shifts"]:
        """Mean over the action dimensions that some shift explains; over all that vary where there is none."""
        known = self.best != UNKNOWN
        columns = self.unexplained[:, known] if known.any() else self.unexplained
        return np.nanmean(columns, axis=1) if np.isfinite(columns).any() else np.full(len(self.shifts), np.nan)


UNKNOWN = -99


def measure_lag(rows: Rows, action_dim: int) -> Lag:
    """Fit the inverse for every shift that the rows allow and find the best one of each dimension of the first action.

    The inverse of a shift k is the linear one from (s_{t+k}, s_{t+k+1}), or a line through the one dimension of
    either that tells the action best, whichever is better on episodes that it was not fitted on: with many dimensions
    and few episodes the first learns what the episodes have in common rather than what the action does.
    """
    shifts = [k for k in range(FIRST_SHIFT, LAST_SHIFT + 1) if k in rows.offsets and k + 1 in rows.offsets]
    tracked = {k: unexplained_by_one_state(rows, k) for k in (*shifts, shifts[-1] + 1)}
    curves = np.array(
        [
            reduce(np.fmin, [unexplained(rows, fit_folds(rows, rows.shift_blocks(k))), tracked[k], tracked[k + 1]])
            for k in shifts
        ]
    )[:, :action_dim]
    filled = np.where(np.isfinite(curves), curves, np.inf)
    # A position reached at s_{t+k} ends one step and starts the next: of equals take the later.
    position = len(shifts) - 1 - filled[::-1].argmin(axis=0)
    least = filled.min(axis=0)
    own = filled[shifts.index(0)]
    known = least < EXPLAINED
    # No clear gain over the row's own step is no lag.
    position = np.where(known & (least > IMPROVEMENT * own), shifts.index(0), position)
    best = np.where(known, np.array(shifts)[position], UNKNOWN)
    at_edge = known & (best != 0) & ((position == 0) | (position == len(shifts) - 1))
    return Lag(tuple(shifts), curves, best, at_edge)


def check_lag(lag: Lag, window: Window, names: Names, advised_gap: int = 1) -> list[Finding]:
    """Say which step the action explains best, where that is not its own.

    Args:
        lag: the measurement.
        window: the configured one.
        names: of the dimensions.
        advised_gap: the gap that leaves the action least open; advised here too where it covers the lag.
    """
    steps = lag.steps
    if not steps:
        return []
    inside = lag.best[lag.lagging & ~lag.at_edge]
    beyond = np.flatnonzero(lag.at_edge)
    position = lag.shifts.index(steps)
    own = lag.shifts.index(0)
    curve = lag.mean_curve
    evidence = (
        f"the inverse of that step leaves {curve[position]:.3g} of the action's variance, of the row's own step "
        f"{curve[own]:.3g} (mean over the dimensions)"
    )
    if len(inside):
        low, high = np.quantile(inside, [0.25, 0.75], method="nearest")
        evidence += f"; half of the dimensions that lag lie between {low:+d} and {high:+d}"
    if len(beyond):
        evidence += f"; {list_dims([names.action[i] for i in beyond])}: {lag.best[beyond][0]:+d} or further"
    covered = -window.history <= steps < window.gap
    return [
        Finding(
            check="lag",
            severity=WARNING,
            title=f"action lag {steps:+d}: the action in row t explains the step t{steps:+d} best",
            evidence=evidence + ("; the configured rows contain that step" if covered else ""),
            fix="" if covered else _fix(steps, window.gap, advised_gap),
            figures={
                "lag": steps,
                "shifts": list(lag.shifts),
                "unexplained": curve.tolist(),
                "unexplained_per_dim": lag.unexplained.tolist(),
                "best_per_dim": lag.best.tolist(),
                "at_edge": lag.at_edge.tolist(),
            },
        )
    ]


def _fix(steps: int, gap: int, advised_gap: int) -> str:
    if steps < 0:
        return f"history: {-steps}, so that the row contains the step that its action explains"
    enough = advised_gap if advised_gap >= steps and advised_gap != gap else steps + 1
    return f"gap: {enough}, so that the row reaches the state that its action leads to"
