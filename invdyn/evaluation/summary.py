"""An evaluation in words and a table: what the report and the console show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

from invdyn.evaluation.findings import LINEAR
from invdyn.evaluation.page import Card, Table
from invdyn.evaluation.results import Evaluation, Result

MISSING = "-"


@dataclass(frozen=True)
class _Column:
    name: str
    value: Callable[[Result], float | None]
    better: Callable[[Iterable[float]], float] = min
    digits: str | None = None


_EXACT, _ROUND_TRIP = "vs exact inverse", "round trip"
_COLUMNS = (
    _Column("RMSE / std, one sample", lambda r: r.one_sample.nrmse),
    _Column("RMSE / std, mean of samples", lambda r: r.mean_of_samples.nrmse),
    _Column("R², one sample", lambda r: r.one_sample.r2, max, digits=".5f"),
    _Column("energy score", lambda r: r.energy_score),
    _Column(_EXACT, lambda r: r.simulated.exact_nrmse),
    _Column(_ROUND_TRIP, lambda r: r.simulated.round_trip.nrmse if r.simulated.round_trip else None),
    _Column("ms for 1", lambda r: r.speed.latency_ms_batch_1),
    _Column("actions/s, batch 1,000", lambda r: r.speed.actions_per_s, max),
)


def summary_table(evaluation: Evaluation) -> Table:
    """Return all results as text: a row per model and number of steps, the best of each column marked."""
    results = evaluation.results
    columns = [column for column in _COLUMNS if any(known(column.value(result)) for result in results)]
    rows = [
        [r.model, _steps(r), f"{r.network_evaluations:,}", *(number(c.value(r), c.digits) for c in columns)]
        for r in results
    ]
    best = set()
    for index, column in enumerate(columns, start=3):
        values = [column.value(result) for result in results]
        target = column.better(value for value in values if known(value))
        best |= {(row, index) for row, value in enumerate(values) if value == target}
    floor = _floor(evaluation)
    if any(column.name in floor for column in columns):
        cells = (number(floor[column.name]) if column.name in floor else "" for column in columns)
        rows.append(["recorded actions (floor)", "", "", *cells])
    header = ["model", "steps", "network evaluations", *(column.name for column in columns)]
    chosen = results.index(evaluation.default_of(evaluation.subject))
    return Table(header, rows, frozenset(best), chosen)


def number(value: float | None, digits: str | None = None) -> str:
    """Return three significant digits (or the format `digits`), without an exponent where that is readable.

    Example:
        >>> number(0.0123456), number(123456.0), number(1.2e-9), number(None)
        ('0.0123', '123,000', '1.2e-09', '-')
    """
    if not known(value):
        return MISSING
    if digits is not None:
        return f"{value:{digits}}"
    rounded = float(f"{value:.3g}")
    if rounded and not 1e-4 <= abs(rounded) < 1e9:
        return f"{rounded:.2g}"
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def known(value: float | None) -> TypeGuard[float]:
    """Return whether a value is there and finite."""
    return value is not None and math.isfinite(value)


def headline_cards(evaluation: Evaluation) -> list[Card]:
    """Return the numbers to read first, each with what it means."""
    own = evaluation.default_of(evaluation.subject)
    cards = [_error_card(own)]
    if own.simulated.round_trip is not None:
        cards.append(_round_trip_card(evaluation, own.simulated.round_trip.nrmse))
    if LINEAR in evaluation.models and evaluation.subject != LINEAR:
        cards.append(_linear_card(own, evaluation.default_of(LINEAR)))
    return [*cards, _speed_card(evaluation, own)]


def explanations(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what each column of the table means, and why one is missing."""
    rmse = (
        "Error against the recorded action over all dimensions, in units of the actions' standard deviation in the "
        "training rows. Where several actions are right, one sample is one guess and the mean of "
        f"{evaluation.num_samples} averages them."
    )
    energy = (
        "Quality of the samples as a distribution, in the same units as RMSE / std; lower is better. A model that "
        "gives one action scores its mean absolute error."
    )
    return [
        ("RMSE / std", rmse),
        (
            "R²",
            "Share of the variance of these rows explained, mean over dimensions: 1 is perfect, 0 is the mean action.",
        ),
        ("energy score", energy),
        ("vs exact inverse", _exact_explanation(evaluation)),
        ("round trip", _round_trip_explanation(evaluation)),
        ("speed", f"Medians of wall time, all variants in turn, on {_machine(evaluation)}."),
    ]


def _error_card(own: Result) -> Card:
    count = own.network_evaluations
    cost = f"{count} network evaluation{'' if count == 1 else 's'}"
    note = (
        f"One sample, at {cost}, is typically off by {number(100 * own.one_sample.nrmse)}% of the spread of the "
        "actions. Always answering the mean action scores 1."
    )
    return Card("RMSE / std of the action", number(own.one_sample.nrmse), note)


def _round_trip_card(evaluation: Evaluation, error: float) -> Card:
    floor = evaluation.recorded.round_trip
    note = "In the simulator, the predicted action misses the recorded next state by this share of a typical change."
    return Card("Round trip", number(error), note + (f" The recorded action: {number(floor.nrmse)}." if floor else ""))


def _linear_card(own: Result, linear: Result) -> Card:
    error = own.one_sample.nrmse
    ratio = linear.one_sample.nrmse / error if error else math.inf
    note = f"The linear inverse, which needs no training, has an RMSE / std of {number(linear.one_sample.nrmse)}."
    if not math.isfinite(ratio):
        return Card("Against the linear inverse", MISSING, note)
    better, times = ("lower", ratio) if ratio >= 1 else ("higher", 1 / ratio)
    return Card(
        "Against the linear inverse", f"{number(times)}x {better}", f"The model's error is this much {better}. {note}"
    )


def _speed_card(evaluation: Evaluation, own: Result) -> Card:
    note = (
        f"Actions per second in batches of 1,000 on {_machine(evaluation)}. One action alone takes "
        f"{number(own.speed.latency_ms_batch_1)} ms."
    )
    return Card("Speed", f"{number(own.speed.actions_per_s)}/s", note)


def _exact_explanation(evaluation: Evaluation) -> str:
    if evaluation.exact_reason is not None:
        return f"Not available: {evaluation.exact_reason}."
    rows = f"{evaluation.exact_rows:,} of {evaluation.num_rows:,}"
    return (
        f"RMSE / std against the action that the simulator's equations of motion give, on the {rows} rows without "
        "active contacts, joint limits or clipped actions. The floor is the rounding of the recorded states."
    )


def _round_trip_explanation(evaluation: Evaluation) -> str:
    if evaluation.round_trip_reason is not None:
        return f"Not available: {evaluation.round_trip_reason}."
    return (
        f"The simulator ({evaluation.env_id}) is put in s, given the predicted action (clipped to its own range), and "
        "compared with s', in units of the standard deviation of s' - s. The number that matters when several actions "
        "are right."
    )


def _machine(evaluation: Evaluation) -> str:
    if evaluation.device == "cpu":
        return f"the CPU with {evaluation.cpu_threads} thread{'s' if evaluation.cpu_threads > 1 else ''}"
    return evaluation.device


def _steps(result: Result) -> str:
    return MISSING if result.num_inference_steps is None else f"{result.num_inference_steps:,}"


def _floor(evaluation: Evaluation) -> dict[str, float]:
    recorded = evaluation.recorded
    floor = {_EXACT: recorded.exact_nrmse, _ROUND_TRIP: recorded.round_trip.nrmse if recorded.round_trip else None}
    return {name: value for name, value in floor.items() if known(value)}
