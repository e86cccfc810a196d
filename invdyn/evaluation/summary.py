"""An evaluation in words and a table: what the report and the console show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

from invdyn.evaluation.findings import LINEAR
from invdyn.evaluation.intervals import CONFIDENCE, FEWEST_EPISODES, Interval
from invdyn.evaluation.page import Card, Table
from invdyn.evaluation.results import Evaluation, ExactPosterior, Result

MISSING = "-"
MAX_DIMENSIONS = 64
_POSTERIOR = "exact posterior (floor)"


@dataclass(frozen=True)
class _Column:
    name: str
    value: Callable[[Result], float | None]
    better: Callable[[Iterable[float]], float] = min
    digits: str | None = None


_ONE, _MEAN = "RMSE / std, one sample", "RMSE / std, mean of samples"
_ENERGY, _COVERAGE, _TWO_SAMPLE = "energy score", "in 90% region", "C2ST"
_EXACT, _ROUND_TRIP = "vs exact inverse", "round trip"
_COLUMNS = (
    _Column(_ONE, lambda r: r.one_sample.nrmse),
    _Column(_MEAN, lambda r: r.mean_of_samples.nrmse),
    _Column(_ENERGY, lambda r: r.energy_score),
    _Column(
        _COVERAGE, lambda r: r.calibration.coverage_90, lambda found: min(found, key=lambda v: abs(v - 0.9)), ".1%"
    ),
    _Column("NLL per dim", lambda r: r.likelihood.nats_per_dim if r.likelihood else None, digits=".3f"),
    _Column(_TWO_SAMPLE, lambda r: r.two_sample.accuracy if r.two_sample else None, digits=".3f"),
    _Column(_EXACT, lambda r: r.simulated.exact_nrmse),
    _Column(_ROUND_TRIP, lambda r: r.simulated.round_trip.nrmse if r.simulated.round_trip else None),
    _Column("ms for 1", lambda r: r.speed.latency_ms_batch_1),
    _Column("actions/s, batch 1,000", lambda r: r.speed.actions_per_s, max),
)


def summary_table(evaluation: Evaluation) -> Table:
    """Return all results as text: a row per model and number of steps, the best of each column marked.

    Below them stand the floors: what the recorded actions, the exact posterior and neighbouring transitions score.
    """
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
    for label, floor in _floors(evaluation).items():
        cells = (number(floor[c.name], c.digits) if c.name in floor else "" for c in columns)
        rows.append([label, "", "", *cells])
    header = ["model", "steps", "network evaluations", *(column.name for column in columns)]
    chosen = results.index(evaluation.default_of(evaluation.subject))
    return Table(header, rows, frozenset(best), chosen)


def distribution_table(evaluation: Evaluation) -> Table:
    """Return every model at its own number of steps as a distribution, with 95% intervals over episodes."""
    own = [evaluation.default_of(model) for model in evaluation.models]
    header = [
        "model",
        "RMSE / std, one sample",
        "energy score",
        "CRPS",
        "in 50% region",
        "in 90% region",
        "calibration error",
        "90% width / std",
    ]
    has_nll, has_two_sample = (any(getattr(r, name) for r in own) for name in ("likelihood", "two_sample"))
    header += ["NLL", "NLL per dim", "NLL per dim, action / std"] * has_nll + ["C2ST", "force error"] * has_two_sample
    rows = []
    for result in own:
        row = [result.label, *_distribution_cells(result)]
        if has_nll:
            row += _likelihood_cells(result)
        if has_two_sample:
            two_sample = result.two_sample
            row.append(f"{two_sample.accuracy:.3f} ± {2 * two_sample.standard_error:.3f}" if two_sample else MISSING)
            row.append(number(result.simulated.force_nrmse))
        rows.append(row)
    if evaluation.posterior is not None:
        cells = [_POSTERIOR, *_distribution_cells(evaluation.posterior)]
        rows.append([*cells, *[""] * (len(header) - len(cells))])
    return Table(header, rows, chosen=0)


def dimension_table(evaluation: Evaluation) -> Table:
    """Return the model under evaluation at its own number of steps, one row per action dimension, physical units."""
    own = evaluation.default_of(evaluation.subject)
    errors, calibration = own.one_sample, own.calibration
    header = ["action dimension", "RMSE", "RMSE / std", "R²", "CRPS", "in central 50%", "in central 90%"]
    header += ["width of 50%", "width of 90%"]
    columns = (
        [number(value) for value in errors.rmse_per_dim],
        [number(value) for value in errors.nrmse_per_dim],
        [number(value, ".5f") for value in errors.r2_per_dim],
        [number(value) for value in own.scores.crps_per_dim],
        [number(value, ".1%") for value in calibration.central_50_per_dim],
        [number(value, ".1%") for value in calibration.central_90_per_dim],
        [number(value) for value in calibration.width_50_per_dim],
        [number(value) for value in calibration.width_90_per_dim],
    )
    return Table(header, [[str(dim), *cells] for dim, cells in enumerate(zip(*columns, strict=True))][:MAX_DIMENSIONS])


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
    calibration = evaluation.results[0].calibration
    region = (
        "Share of recorded actions that lie in the region to which the model gives 90% of its probability, at its "
        "highest density: 90% is right, less is over-confident, more is too wide. Judged by the rank of the recorded "
        f"action among {calibration.num_samples} samples on {calibration.num_rows:,} rows. A model that gives one "
        "action has no regions, and holds none."
    )
    return [
        ("RMSE / std", rmse),
        ("energy score", energy),
        ("in 90% region", region),
        ("vs exact inverse", _exact_explanation(evaluation)),
        ("round trip", _round_trip_explanation(evaluation)),
        ("exact posterior", _posterior_explanation(evaluation)),
        ("neighbours", _neighbour_explanation(evaluation)),
        ("NLL", _likelihood_explanation(evaluation)),
        ("speed", f"Medians of wall time, all variants in turn, on {_machine(evaluation)}."),
    ]


def distribution_explanations(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what the columns of `distribution_table` and `dimension_table` mean."""
    brackets = (
        f"In brackets: {CONFIDENCE:.0%} intervals from a bootstrap over the {evaluation.num_episodes:,} episodes of "
        "the rows. They say how much the rows decide, not how much the training seed does."
    )
    if evaluation.num_episodes < FEWEST_EPISODES:
        brackets = f"Not available: the rows are from {evaluation.num_episodes} episodes, fewer than {FEWEST_EPISODES}."
    two_sample = (
        "Accuracy of a network trained to tell the model's actions from those of the exact posterior, on transitions "
        "it has not seen: 0.5 when it cannot, 1 when it always can, ± twice the standard error. It is blind to "
        "differences far smaller than the spread of the actions."
    )
    explained = [
        ("intervals", brackets),
        ("CRPS", "The energy score of each action dimension alone, mean over dimensions, in std of the action."),
        ("calibration error", "Mean distance of the calibration curve from the diagonal; 0 is right."),
        ("90% width", "Mean width of the central interval that holds 90% of the samples: narrow is sharp."),
    ]
    if any(result.two_sample for result in evaluation.results):
        explained += [
            ("C2ST", two_sample),
            ("force error", "RMSE / std of the motor's force that the action gives, against the exact force."),
        ]
    if any(result.likelihood for result in evaluation.results):
        explained.append(("NLL", "In nats: of the density per unit of the action, or per standard deviation of it."))
    return explained


def _error_card(own: Result) -> Card:
    count = own.network_evaluations
    cost = f"{count} network evaluation{'' if count == 1 else 's'}"
    note = "Always answering the mean action scores 1."
    if known(own.one_sample.nrmse):
        off = number(100 * own.one_sample.nrmse)
        note = f"One sample, at {cost}, is typically off by {off}% of the spread of the actions. {note}"
    return Card("RMSE / std of the action", number(own.one_sample.nrmse), note)


def _round_trip_card(evaluation: Evaluation, error: float) -> Card:
    floor = evaluation.recorded.round_trip
    note = "In the simulator, the predicted action misses the recorded next state by this share of a typical change."
    return Card("Round trip", number(error), note + (f" The recorded action: {number(floor.nrmse)}." if floor else ""))


def _linear_card(own: Result, linear: Result) -> Card:
    error = own.energy_score
    ratio = linear.energy_score / error if error > 0 else math.inf
    note = f"The linear inverse, which needs no training, has an energy score of {number(linear.energy_score)}."
    if not math.isfinite(ratio):
        return Card("Against the linear inverse", MISSING, note)
    better, times = ("lower", ratio) if ratio >= 1 else ("higher", 1 / ratio)
    return Card(
        "Against the linear inverse", f"{number(times)}x {better}", f"The energy score is this much {better}. {note}"
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


def _likelihood_explanation(evaluation: Evaluation) -> str:
    text = "Minus the log density of the recorded action, in nats, per action dimension; lower is better."
    without: dict[str, list[str]] = {}
    for model in evaluation.models:
        if reason := evaluation.default_of(model).likelihood_reason:
            without.setdefault(reason, []).append(model)
    return text + "".join(f" Not available for {', '.join(models)}: {reason}." for reason, models in without.items())


def _machine(evaluation: Evaluation) -> str:
    if evaluation.device == "cpu":
        return f"the CPU with {evaluation.cpu_threads} thread{'s' if evaluation.cpu_threads > 1 else ''}"
    return evaluation.device


def _steps(result: Result) -> str:
    return MISSING if result.num_inference_steps is None else f"{result.num_inference_steps:,}"


def _floors(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return what limits every model: label to the values of some columns."""
    recorded, posterior, noise = evaluation.recorded, evaluation.posterior, evaluation.noise_floor
    trip = recorded.round_trip.nrmse if recorded.round_trip else None
    floors: dict[str, dict[str, float | None]] = {
        "recorded actions (floor)": {_EXACT: recorded.exact_nrmse, _ROUND_TRIP: trip}
    }
    if posterior is not None:
        floors[_POSTERIOR] = {
            _ONE: posterior.one_sample.nrmse,
            _MEAN: posterior.mean_of_samples.nrmse,
            _ENERGY: posterior.scores.energy_score,
            _COVERAGE: posterior.calibration.coverage_90,
            _TWO_SAMPLE: 0.5,
        }
    elif noise is not None:
        floors["neighbours (floor, at most)"] = {_ONE: math.sqrt(2) * noise.nrmse, _MEAN: noise.nrmse}
    found = {label: {name: v for name, v in floor.items() if known(v)} for label, floor in floors.items()}
    return {label: floor for label, floor in found.items() if floor}


def _distribution_cells(found: Result | ExactPosterior) -> list[str]:
    scores, calibration, error = found.scores, found.calibration, found.one_sample
    return [
        _with_interval(error.nrmse, error.nrmse_interval),
        _with_interval(scores.energy_score, scores.energy_score_interval),
        _with_interval(scores.crps, scores.crps_interval),
        _with_interval(calibration.coverage_50, calibration.coverage_50_interval, ".1%"),
        _with_interval(calibration.coverage_90, calibration.coverage_90_interval, ".1%"),
        number(calibration.error, ".3f"),
        number(calibration.width_90),
    ]


def _likelihood_cells(result: Result) -> list[str]:
    found = result.likelihood
    if found is None:
        return [MISSING] * 3
    if found.impossible:
        return [f"infinite: {found.impossible:.2%} of rows impossible", MISSING, MISSING]
    values = (found.nats_per_dim, found.nats_per_dim_of_std)
    return [_with_interval(found.nats, found.interval, ".3f"), *(number(value, ".3f") for value in values)]


def _with_interval(value: float, interval: Interval | None, digits: str | None = None) -> str:
    if interval is None or not known(value):
        return number(value, digits)
    return f"{number(value, digits)}\n[{number(interval.low, digits)}, {number(interval.high, digits)}]"


def _posterior_explanation(evaluation: Evaluation) -> str:
    if evaluation.posterior_reason is not None:
        return f"Not available: {evaluation.posterior_reason}."
    return "The exact distribution of the actions that could have been taken, sampled as if it were a model."


def _neighbour_explanation(evaluation: Evaluation) -> str:
    noise = evaluation.noise_floor
    if noise is None:
        training = evaluation.split == "train"
        return f"Not available: {'each training row is its own neighbour' if training else 'too few transitions'}."
    return (
        "What transitions near each other leave open of the action, at most: the lowest RMSE / std of a mean "
        f"prediction is {number(noise.nrmse)} or less, that of one sample of the right distribution "
        f"{number(math.sqrt(2) * noise.nrmse)} or less. From {noise.num_references:,} training rows by the Gamma "
        "test: 0 where neighbours differ no more than a smooth function would, and too high where rows are few for "
        "the number of state dimensions."
    )
