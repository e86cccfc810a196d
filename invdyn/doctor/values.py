"""Checks of single columns: NaN and infinity, columns that hardly change, actions at their bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from invdyn.doctor.findings import ERROR, INFO, MAX_PLACES, WARNING, Finding, Place
from invdyn.doctor.sample import Sample
from invdyn.evaluation.findings import list_dims
from invdyn.transitions.filters import FEW_VALUES, constant_columns
from invdyn.transitions.rounding import ADVICE, Rounding

NEAR_CONSTANT_STD = 1e-6
"""Standard deviation relative to the largest value below which a column holds rounding noise."""

NEAR_CONSTANT_SHARE = 0.995
"""Share of rows with one exact value above which a column says next to nothing."""

SATURATED_SHARE = 0.02
"""Share of rows at a bound of an action: a continuous action takes its extreme once."""


@dataclass(frozen=True)
class Names:
    """What the columns are called.

    Attributes:
        state: one name per state dimension.
        action: one name per action dimension.
    """

    state: tuple[str, ...]
    action: tuple[str, ...]

    def of_states(self, dims: Int[np.ndarray, "dims"]) -> str:
        """Return names of state dimensions in one line."""
        return list_dims([self.state[dim] for dim in dims])

    def of_actions(self, dims: Int[np.ndarray, "dims"]) -> str:
        """Return names of action dimensions in one line."""
        return list_dims([self.action[dim] for dim in dims])


def bad_rows(values: Num[np.ndarray, "rows dim"]) -> Bool[np.ndarray, "rows"]:
    """Return which rows hold NaN, infinity, or what becomes infinite as float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(~np.isfinite(values.astype(np.float32)).all(axis=1))


def common_value_share(values: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "dim"]:
    """Return the share of rows that hold each column's most common value.

    Example:
        >>> common_value_share(np.array([[0.0, 1.0], [0.0, 2.0], [5.0, 3.0], [0.0, 4.0]])).tolist()
        [0.75, 0.25]
    """
    return np.array([np.unique(column, return_counts=True)[1].max() for column in values.T]) / len(values)


def near_constant_columns(values: Float[np.ndarray, "rows dim"]) -> Bool[np.ndarray, "dim"]:
    """Return which columns change, but only by rounding or in next to no row."""
    noise = values.std(axis=0) <= NEAR_CONSTANT_STD * np.abs(values).max(axis=0)
    rare = common_value_share(values) >= NEAR_CONSTANT_SHARE
    return np.asarray((noise | rare) & ~constant_columns(values))


def bound_shares(action: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "two dim"]:
    """Return the share of rows exactly at the lowest and at the highest value of each column."""
    return np.stack([(action == action.min(axis=0)).mean(axis=0), (action == action.max(axis=0)).mean(axis=0)])


def num_values(values: Float[np.ndarray, "rows dim"]) -> Int[np.ndarray, "dim"]:
    """Return the number of distinct values of each column."""
    return np.array([len(np.unique(column)) for column in values.T])


def check_finite_values(sample: Sample) -> tuple[list[Finding], Bool[np.ndarray, "episodes"]]:
    """Find NaN and infinity.

    Returns:
        The findings, and which episodes are free of them.
    """
    findings = []
    clean = np.ones(sample.num_episodes, dtype=bool)
    for name, values, lengths, start in (
        ("state", sample.state, sample.num_states, sample.state_start),
        ("action", sample.action, sample.num_actions, sample.action_start),
    ):
        bad = np.flatnonzero(bad_rows(values))
        if not len(bad):
            continue
        episode = np.repeat(np.arange(sample.num_episodes), lengths)[bad]
        clean[episode] = False
        with np.errstate(over="ignore"):
            columns = np.flatnonzero(~np.isfinite(values[bad].astype(np.float32)).all(axis=0))
        places: tuple[Place, ...] = tuple(
            sample.place(int(e), int(row - start[e]))
            for e, row in zip(episode[:MAX_PLACES], bad[:MAX_PLACES], strict=True)
        )
        findings.append(
            Finding(
                check="finite",
                severity=ERROR,
                title=f"{len(bad):,} rows of {len(values):,} hold NaN or infinity in {name}",
                evidence=f"{name} dimension {list_dims(columns.tolist())}, in {len(np.unique(episode))} of "
                f"{sample.num_episodes:,} episodes; first at {places[0]}",
                fix="filters: {episodes: {exclude: [FILE:EPISODE, ...]}} with them, or record them again",
                places=places,
                figures={"rows": len(bad), "dims": columns.tolist(), "episodes": len(np.unique(episode))},
            )
        )
    return findings, clean


def measure_rounding(sample: Sample) -> Rounding:
    """Return how finely float32 will hold the states."""
    before = sample.steps.state_row
    step_std = (sample.state[before + 1] - sample.state[before]).std(axis=0)
    return Rounding(np.sqrt(np.mean(sample.state**2, axis=0)), step_std)


def check_rounding(sample: Sample, names: Names) -> list[Finding]:
    """Find dimensions of the state whose motion is lost when they are stored as float32."""
    rounding = measure_rounding(sample)
    lossy = rounding.lossy
    if not len(lossy):
        return []
    return [
        Finding(
            check="rounding",
            severity=WARNING,
            title=f"float32 is too coarse for {_count(len(lossy), 'state dimension')} of {sample.state.shape[1]}",
            evidence=f"{names.of_states(lossy)}: stored as float32, s' - s is rounded {rounding.describe_worst()}: a "
            "large offset, or a dimension that holds rounding noise only",
            fix=ADVICE,
            figures={"dims": lossy.tolist(), "share": rounding.share[lossy].tolist()},
        )
    ]


def check_constant(sample: Sample, names: Names) -> list[Finding]:
    """Find columns of state and action that never, or hardly ever, change, but for what `check_rounding` finds."""
    findings = []
    near_constant_states = near_constant_columns(sample.state)
    near_constant_states[measure_rounding(sample).lossy] = False
    for kind, values, near_constant, describe in (
        ("state", sample.state, near_constant_states, names.of_states),
        ("action", sample.action, near_constant_columns(sample.action), names.of_actions),
    ):
        for check, word, why, dims in (
            ("constant", "never changes", "one value in all rows looked at", constant_columns(values)),
            (
                "near_constant",
                "hardly ever changes",
                f"changes by rounding only, or holds one value in {NEAR_CONSTANT_SHARE:.1%} of the rows or more",
                near_constant,
            ),
        ):
            found = np.flatnonzero(dims)
            if len(found):
                findings.append(
                    Finding(
                        check=check,
                        severity=WARNING,
                        title=f"{_count(len(found), f'{kind} dimension')} of {values.shape[1]} {word}",
                        evidence=f"{describe(found)}: {why}",
                        fix="filters: {drop_constant_dims: true}"
                        if check == "constant"
                        else "leave the dimension out of shape_meta, or record more of what moves it",
                        figures={"kind": kind, "dims": found.tolist()},
                    )
                )
    return findings


def check_saturated(sample: Sample, names: Names) -> list[Finding]:
    """Find continuous actions that sit at their bounds, and actions that take only a few values."""
    action = sample.action[sample.steps.action_row]
    shares, values = bound_shares(action), num_values(action)
    low, high = action.min(axis=0), action.max(axis=0)
    varies = low != high
    at_bounds = (shares * (shares * len(action) > 1.5)).sum(axis=0)  # the extreme itself, taken once, is no bound
    saturated = np.flatnonzero(varies & (values >= FEW_VALUES) & (at_bounds >= SATURATED_SHARE))
    switches = np.flatnonzero(varies & (values < min(FEW_VALUES, len(action) // 4)))
    findings = []
    if len(saturated):
        worst = saturated[at_bounds[saturated].argmax()]
        rows = ((action[:, saturated] == low[saturated]) | (action[:, saturated] == high[saturated])).any(axis=1)
        findings.append(
            Finding(
                check="saturated",
                severity=WARNING,
                title=f"{rows.mean():.1%} of the rows have an action at its bound",
                evidence=f"worst is {names.action[worst]}: {shares[0, worst]:.1%} of the rows at {low[worst]:.6g}, "
                f"{shares[1, worst]:.1%} at {high[worst]:.6g}; dimensions: {names.of_actions(saturated)}. If the "
                "controller asked for more than the bound, many commands give the same motion",
                fix="filters: {saturated_actions: drop} leaves those rows out; keep them where the recorded action is "
                "what was applied",
                places=sample.places(np.flatnonzero(rows)),
                figures={
                    "dims": saturated.tolist(),
                    "at_low": shares[0, saturated].tolist(),
                    "at_high": shares[1, saturated].tolist(),
                    "rows": int(rows.sum()),
                },
            )
        )
    if len(switches):
        findings.append(
            Finding(
                check="discrete",
                severity=INFO,
                title=f"{_count(len(switches), 'action dimension')} of {action.shape[1]} take only a few values",
                evidence=f"{names.of_actions(switches)}: {list_dims(values[switches].tolist())} distinct values; a "
                "regression answers values between them",
                figures={"dims": switches.tolist(), "values": values[switches].tolist()},
            )
        )
    return findings


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
