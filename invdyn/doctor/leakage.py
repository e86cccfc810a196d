"""Label leakage: a state dimension that is an action of the row, so that a model has nothing to learn."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from invdyn.doctor.findings import ERROR, WARNING, Finding
from invdyn.doctor.sample import Sample
from invdyn.doctor.values import Names
from invdyn.transitions.filters import constant_columns
from invdyn.transitions.store import spread_rows
from invdyn.transitions.windows import Window

MAX_ROWS = 20_000
EQUAL_TOLERANCE = 1e-6
LEAK_SHARE = 0.99
PARTIAL_SHARE = 0.5
AFFINE_UNEXPLAINED = 1e-9
"""1 - correlation^2 below which a state dimension is a fixed multiple of the action: float32 rounding."""


def equal_shares(
    state: Float[np.ndarray, "rows state_dim"], action: Float[np.ndarray, "rows action_dim"]
) -> Float[np.ndarray, "state_dim action_dim"]:
    """Return in which share of the rows each state dimension equals each action dimension.

    Rows with the action's most common value do not count: two columns that rest at 0 are equal there by chance.
    """
    shares = np.zeros((state.shape[1], action.shape[1]))
    for j, column in enumerate(action.T):
        values, counts = np.unique(column, return_counts=True)
        telling = column != values[counts.argmax()] if counts.max() > 1 else np.ones(len(column), bool)
        if telling.any():
            tolerance = EQUAL_TOLERANCE * np.abs(column).max()
            shares[:, j] = (np.abs(state[telling] - column[telling, None]) <= tolerance).mean(axis=0)
    return shares


def squared_correlation(
    state: Float[np.ndarray, "rows state_dim"], action: Float[np.ndarray, "rows action_dim"]
) -> Float[np.ndarray, "state_dim action_dim"]:
    """Return the squared correlation of each state dimension with each action dimension; 0 for constant ones."""

    def standardise(values: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim"]:
        centred = values - values.mean(axis=0)
        std = np.where(constant_columns(values), np.inf, centred.std(axis=0))
        scaled: Float[np.ndarray, "rows dim"] = centred / np.maximum(std, 1e-300)
        return scaled

    correlation: Float[np.ndarray, "state_dim action_dim"] = standardise(state).T @ standardise(action) / len(state)
    return correlation**2


def check_leakage(sample: Sample, window: Window, names: Names) -> list[Finding]:
    """Find state dimensions that hold an action of the row: at once, or in another of the row's states."""
    steps = sample.steps
    last = sample.num_states[steps.episode] - 1
    findings = []
    for shift in row_shifts(window):
        inside = np.flatnonzero((steps.step + shift >= 0) & (steps.step + shift <= last))
        if not len(inside):
            continue
        chosen = inside[spread_rows(len(inside), MAX_ROWS)]
        state, action = sample.state[steps.state_row[chosen] + shift], sample.action[steps.action_row[chosen]]
        shares = equal_shares(state, action) * ~constant_columns(action) * ~constant_columns(state)[:, None]
        findings += _equal(shift, shares, names)
        multiples = (1 - squared_correlation(state, action) < AFFINE_UNEXPLAINED) & (shares < PARTIAL_SHARE)
        if multiples.any():
            findings.append(_affine(shift, multiples, names))
    return findings


def row_shifts(window: Window) -> list[int]:
    """Return each k for which some row holds a state s_{t+k} together with the action a_t.

    Example:
        >>> row_shifts(Window(gap=3)), row_shifts(Window(gap=3, horizon=2, history=1))
        ([0, 3], [-2, -1, 0, 2, 3])
    """
    return sorted({at - of for at in (*range(-window.history, 1), window.gap) for of in range(window.horizon)})


def _equal(shift: int, shares: Float[np.ndarray, "state_dim action_dim"], names: Names) -> list[Finding]:
    findings = []
    for severity, found in (
        (ERROR, shares >= LEAK_SHARE),
        (WARNING, (shares >= PARTIAL_SHARE) & (shares < LEAK_SHARE)),
    ):
        state_dims, action_dims = np.nonzero(found)
        if len(state_dims):
            findings.append(
                Finding(
                    check=_check(shift),
                    severity=severity,
                    title=f"the label leaks: {_dims(names, state_dims)} holds {_action(shift)}",
                    evidence=f"state[t{f'{shift:+d}' if shift else ''}] equals action[t] in at least "
                    f"{shares[found].min():.1%} of the rows where the action is not at rest: "
                    f"{_pairs(names, state_dims, action_dims)}. A model reads the answer, and is of no use where the "
                    "action is not known",
                    fix="leave that key out of shape_meta.obs",
                    figures={
                        "state_dims": state_dims.tolist(),
                        "action_dims": action_dims.tolist(),
                        "shares": shares[found].tolist(),
                    },
                )
            )
    return findings


def _affine(shift: int, found: np.ndarray, names: Names) -> Finding:
    state_dims, action_dims = np.nonzero(found)
    return Finding(
        check=_check(shift),
        severity=ERROR,
        title=f"the label leaks: {_dims(names, state_dims)} is a fixed multiple of {_action(shift)}",
        evidence=f"1 - correlation^2 is below {AFFINE_UNEXPLAINED:g}: {_pairs(names, state_dims, action_dims)}",
        fix="leave that key out of shape_meta.obs",
        figures={"state_dims": state_dims.tolist(), "action_dims": action_dims.tolist()},
    )


def _check(shift: int) -> str:
    return "leak_next" if shift > 0 else "leak_current"


def _action(shift: int) -> str:
    """Say in words which action s_{t+shift} holds where it holds a_t."""
    if shift == 0:
        return "the action of its own row"
    count = "the row" if abs(shift) == 1 else f"{abs(shift)} rows"
    return f"the action of {count} {'before' if shift > 0 else 'after'}"


def _dims(names: Names, dims: Int[np.ndarray, "found"]) -> str:
    return names.of_states(np.unique(dims))


def _pairs(names: Names, state_dims: Int[np.ndarray, "found"], action_dims: Int[np.ndarray, "found"]) -> str:
    pairs = [f"{names.state[i]} = {names.action[j]}" for i, j in zip(state_dims, action_dims, strict=True)]
    return ", ".join(pairs[:6]) + (f" and {len(pairs) - 6} more" if len(pairs) > 6 else "")
