"""Plots as PNG files: drawn on `Figure` objects, so nothing global is touched and no display is needed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from invdyn import storage
from invdyn.evaluation.results import Evaluation, Result
from invdyn.transitions.plan import SPLITS
from invdyn.transitions.store import TransitionStore
from invdyn.url_path import AnyPath

COLORS = ("#2563eb", "#d97706", "#64748b", "#059669", "#db2777", "#7c3aed")
SPLIT_COLORS = dict(zip(SPLITS, COLORS[:2] + COLORS[3:4], strict=True))
INK, FAINT = "#1f2937", "#d1d5db"
DPI = 144
MAX_BAR_DIMS = 24
MAX_SCATTER_DIMS = 6
MAX_HISTOGRAM_DIMS = 24
HISTOGRAM_COLUMNS = 6
HISTOGRAM_BINS = 60
HISTOGRAM_ROWS = 100_000
COARSE_TICKS_RATIO = 1e3
LOG_BARS_RATIO = 20.0
FAR_BELOW = 100.0


def plot_error_per_dim(evaluation: Evaluation, path: AnyPath) -> None:
    """Draw RMSE / std of each action dimension as bars, one colour per model at its best number of steps."""
    results = [evaluation.best_of(model) for model in evaluation.models]
    total = len(results[0].one_sample.nrmse_per_dim)
    shown = min(total, MAX_BAR_DIMS)
    figure, (axes,) = make_figure(1, width=max(4.8, 1.5 + 0.5 * shown), height=3.4)
    width = 0.8 / len(results)
    for index, (result, color) in enumerate(zip(results, _colors(len(results)), strict=True)):
        offset = (index - (len(results) - 1) / 2) * width
        bars = np.array(result.one_sample.nrmse_per_dim[:shown])
        axes.bar(np.arange(shown) + offset, bars, width, color=color, label=result.label, zorder=2)
    axes.set_xticks(range(shown))
    axes.set_xlabel("action dimension" + _left_out(total, shown))
    axes.set_ylabel("RMSE / std of the action")
    values = [value for result in results for value in result.one_sample.nrmse_per_dim[:shown]]
    if np.nanmax(values) > LOG_BARS_RATIO * np.nanmin(values):
        log_scale(axes, values)
    axes.legend(**_LEGEND_ABOVE, ncols=min(3, len(results)))
    save_figure(figure, path)


def plot_predicted_against_true(evaluation: Evaluation, path: AnyPath) -> None:
    """Draw one predicted sample against the recorded action, per dimension, for the model under evaluation."""
    result = evaluation.best_of(evaluation.subject)
    total = evaluation.truth.shape[1]
    shown = min(total, MAX_SCATTER_DIMS)
    figure, grid = make_figure(shown, width=3.6 * min(shown, 3), height=3.5 * -(-shown // 3), columns=3)
    for dim, axes in enumerate(grid):
        true, predicted = evaluation.truth[:, dim], result.examples[:, dim]
        limits = _limits(np.concatenate([true, predicted]))
        axes.plot(limits, limits, color=FAINT, linewidth=1, zorder=1)
        axes.scatter(true, predicted, s=5, color=COLORS[0], alpha=0.35, linewidths=0, zorder=2, rasterized=True)
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"recorded action {dim} (recorded units)")
        axes.set_ylabel(f"predicted action {dim}")
    figure.suptitle(f"{result.label}, {len(evaluation.truth):,} rows" + _left_out(total, shown), fontsize=9)
    save_figure(figure, path)


def plot_quality_against_steps(evaluation: Evaluation, path: AnyPath) -> bool:
    """Draw the error against the network evaluations per action, next to models without a solver.

    Returns:
        Whether there was anything to draw: some model with a solver.
    """
    flows = [m for m in evaluation.models if evaluation.of_model(m)[0].num_inference_steps is not None]
    if not flows:
        return False
    has_round_trip = evaluation.recorded.round_trip is not None
    figure, grid = make_figure(1 + has_round_trip, width=5.2 * (1 + has_round_trip), height=3.9)
    _draw_curves(grid[0], evaluation, flows, round_trip=False)
    if has_round_trip:
        _draw_curves(grid[1], evaluation, flows, round_trip=True)
    save_figure(figure, path)
    return True


def plot_calibration(evaluation: Evaluation, path: AnyPath) -> None:
    """Draw the share of recorded actions that regions of each level hold, for every model at its own steps.

    The band around the diagonal is where 95% of right models would lie if rows were independent.
    """
    own = [evaluation.default_of(model) for model in evaluation.models]
    curves = {result.label: (result.calibration, color) for result, color in zip(own, _colors(len(own)), strict=True)}
    if evaluation.posterior is not None:
        curves["exact posterior"] = (evaluation.posterior.calibration, INK)
    figure, grid = make_figure(2, width=8.4, height=4.1)
    titles = ("highest-density region, all dimensions", "central interval, mean over dimensions")
    for axes, kind, title in zip(grid, ("region", "central"), titles, strict=True):
        level = np.linspace(0, 1, 101)
        margin = 1.96 * np.sqrt(level * (1 - level) / own[0].calibration.num_rows)
        axes.fill_between(level, level - margin, level + margin, color=FAINT, alpha=0.6, linewidth=0)
        axes.plot(level, level, color=FAINT, linewidth=1)
        for label, (calibration, color) in curves.items():
            held = (0.0, *getattr(calibration, kind), 1.0)
            style = "--" if label == "exact posterior" else "-"
            axes.plot((0.0, *calibration.nominal, 1.0), held, style, color=color, linewidth=1.5, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axes.set_xlabel(f"probability of the {title}", wrap=True)
        axes.set_ylabel("share of recorded actions inside")
    grid[0].legend(**_LEGEND_ABOVE, ncols=2)
    save_figure(figure, path)


def plot_quality_against_cost(curves: Mapping[str, Float[np.ndarray, "points 3"]], path: AnyPath) -> None:
    """Draw the error of networks against the time that an action costs; one line per network.

    Args:
        curves: name of a network to (points, 3): microseconds per action, RMSE / std(action), solver steps. The first
            `len(COLORS)` are named, the rest drawn faintly.
        path: PNG to write.
    """
    figure, (axes,) = make_figure(1, width=7.2, height=5.2)
    for index, (name, points) in reversed(list(enumerate(curves.items()))):
        named = index < len(COLORS)
        color = COLORS[index] if named else FAINT
        axes.plot(*points[:, :2].T, color=color, marker="o", markersize=4, linewidth=1.2, label=name if named else None)
        if index == 0:
            for cost, error, steps in points:
                axes.annotate(f"{steps:.0f}", (cost, error), xytext=(4, 5), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    log_scale(axes, [value for points in curves.values() for value in points[:, 1]])
    axes.set_xlabel("time per action at batch 1,000 (microseconds); numbers: solver steps of the best network")
    axes.set_ylabel("validation RMSE / std(action), one sample")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], **_LEGEND_ABOVE)
    save_figure(figure, path)


def plot_training_curve(metrics_csv: AnyPath, path: AnyPath) -> bool:
    """Draw training and validation loss against the step from a run's `metrics.csv`.

    Returns:
        Whether the file held anything to draw.
    """
    if not metrics_csv.is_file():
        return False
    rows = list(csv.DictReader(metrics_csv.read_text(encoding="utf-8").splitlines()))
    curves = {name: _curve(rows, name) for name in ("train_loss", "val_loss")}
    if not any(len(curve) for curve in curves.values()):
        return False
    figure, (axes,) = make_figure(1, width=6.0, height=3.4)
    for (name, curve), color in zip(curves.items(), COLORS, strict=False):
        if len(curve):
            axes.plot(*curve.T, color=color, linewidth=1.5, label=name.replace("_", " "), marker=_few(curve))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (normalised units)")
    log_scale(axes, [value for curve in curves.values() for value in curve[:, 1]])
    axes.legend(**_LEGEND_ABOVE, ncols=2)
    save_figure(figure, path)
    return True


def plot_distributions(store: TransitionStore, path: str | AnyPath) -> None:
    """Draw histograms of every state and action dimension, one line per split.

    With a history the current state is drawn, with a horizon the first action. Of a large split the first rows of each
    part are drawn, about `HISTOGRAM_ROWS` in all.
    """
    rows = {split: values for split in SPLITS if len(values := _some_rows(store, split))}
    names = [f"state {i}" for i in range(store.state_dim)] + [f"action {i}" for i in range(store.action_dim)]
    state_shown = max(min(store.state_dim, MAX_HISTOGRAM_DIMS - min(store.action_dim, 8)), 1)
    shown = [*range(state_shown), *range(store.state_dim, len(names))][:MAX_HISTOGRAM_DIMS]
    columns = min(HISTOGRAM_COLUMNS, len(shown)) if len(shown) != 5 else 5
    lines = -(-len(shown) // columns)
    figure, grid = make_figure(len(shown), width=2.3 * columns, height=2.0 * lines + 0.5, columns=columns)
    for axes, dim in zip(grid, shown, strict=True):
        _draw_histograms(axes, {split: values[:, dim] for split, values in rows.items()})
        axes.set_xlabel(f"{names[dim]} (recorded units)")
    for first in range(0, len(grid), columns):
        grid[first].set_ylabel("density")
    counts = ", ".join(f"{split} {store.num_rows(split):,}" for split in rows)
    figure.suptitle(f"rows: {counts}" + _left_out(len(names), len(shown)), fontsize=9)
    grid[0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def _draw_curves(axes: Axes, evaluation: Evaluation, flows: Sequence[str], *, round_trip: bool) -> None:
    colors = dict(zip(evaluation.models, _colors(len(evaluation.models)), strict=True))
    values: list[float] = []
    for model in evaluation.models:
        results = evaluation.of_model(model)
        one = [_error(result, round_trip) for result in results]
        values += one
        if model not in flows:
            axes.axhline(one[0], color=colors[model], linestyle="--", linewidth=1.2, label=model, zorder=2)
            continue
        evaluations = [result.network_evaluations for result in results]
        line: dict[str, Any] = {"color": colors[model], "zorder": 3}
        axes.plot(evaluations, one, **line, marker="o", markersize=4, label=f"{model}, one sample")
        if not round_trip:
            mean = [result.mean_of_samples.nrmse for result in results]
            values += mean
            axes.plot(evaluations, mean, **line, linestyle=":", marker=".", label=f"mean of {evaluation.num_samples}")
    floor = evaluation.recorded.round_trip
    if round_trip and floor is not None:
        style: dict[str, Any] = {"color": INK, "linestyle": "-.", "linewidth": 1, "zorder": 2}
        label = f"recorded actions: {floor.nrmse:.1e}"
        if floor.nrmse * FAR_BELOW < np.nanmin(values):
            axes.plot([], [], **style, label=f"{label} (below)")  # in the legend only: the axis would show nothing else
        else:
            values.append(floor.nrmse)
            axes.axhline(floor.nrmse, **style, label=label)
    axes.set_xlabel("network evaluations per action")
    axes.set_ylabel("round trip: RMSE / std of s' - s" if round_trip else "RMSE / std of the action")
    ticks = sorted({result.network_evaluations for model in flows for result in evaluation.of_model(model)})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    log_scale(axes, values)
    axes.legend(**_LEGEND_ABOVE, ncols=2)


def _draw_histograms(axes: Axes, values: dict[str, Float[np.ndarray, "rows"]]) -> None:
    low, high = _limits(np.concatenate(list(values.values())))
    fewest = min(len(column) for column in values.values())
    edges = np.linspace(low, high, int(np.clip(np.sqrt(fewest), 10, HISTOGRAM_BINS)) + 1)
    for split, column in values.items():
        density, _ = np.histogram(column, bins=edges, density=True)
        axes.stairs(density, edges, color=SPLIT_COLORS[split], linewidth=1.1, label=split, fill=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_yticks([])
    axes.set_ylim(bottom=0)


def _some_rows(store: TransitionStore, split: str) -> Float[np.ndarray, "rows columns"]:
    """Return [current state, first action] of the first rows of each part of a split."""
    parts = [part for part in store.parts(split) if part.rows]
    found = [np.empty((0, store.state_dim + store.action_dim), np.float32)]
    for part in parts:
        rows = store.read_rows(part, 0, min(part.rows, -(-HISTOGRAM_ROWS // len(parts))))
        action = rows["action"].reshape(len(rows["action"]), -1)[:, : store.action_dim]
        found.append(np.concatenate([rows["state"][:, -store.state_dim :], action], axis=1))
    return np.concatenate(found)


def _error(result: Result, round_trip: bool) -> float:
    if not round_trip:
        return result.one_sample.nrmse
    return result.simulated.round_trip.nrmse if result.simulated.round_trip else float("nan")


def _curve(rows: list[dict[str, str]], name: str) -> Float[np.ndarray, "points 2"]:
    points = [(float(row["step"]), float(row[name])) for row in rows if row.get("step") and row.get(name)]
    return np.array([point for point in points if np.isfinite(point).all()]).reshape(-1, 2)


def _few(curve: Num[np.ndarray, "points 2"]) -> str | None:
    return "o" if len(curve) == 1 else None


def _limits(values: Num[np.ndarray, "values"]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    margin = 0.04 * (high - low) or max(1e-6, abs(high) * 0.1)
    return low - margin, high + margin


def _left_out(total: int, shown: int) -> str:
    return f" ({total - shown} of {total} dimensions not shown)" if total > shown else ""


def _colors(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


_LEGEND_ABOVE: dict[str, Any] = {
    "frameon": False,
    "fontsize": 7.5,
    "loc": "lower left",
    "bbox_to_anchor": (-0.02, 1.0),
    "borderaxespad": 0.2,
}


def make_figure(count: int, *, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """Return a figure (inches) with `count` plots, by default side by side."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    columns = min(columns or count, count)
    grid = [figure.add_subplot(-(-count // columns), columns, index + 1) for index in range(count)]
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=7.5, length=3, color=FAINT)
        axes.xaxis.label.set(size=8.5, color=INK)
        axes.yaxis.label.set(size=8.5, color=INK)
        axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.7, zorder=0)
        axes.set_axisbelow(True)
    return figure, grid


def log_scale(axes: Axes, values: Iterable[float]) -> None:
    """Make the y axis logarithmic with plain numbers, unless one of the drawn values is zero or negative."""
    finite = [float(value) for value in values if np.isfinite(value)]
    if not finite or min(finite) <= 0:
        return
    low, high = min(finite), max(finite)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.6, high * 1.6)
    subs = (1.0, 2.0, 5.0) if high / low < COARSE_TICKS_RATIO else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path: str | AnyPath) -> None:
    """Write a figure as PNG, its folder made where it is missing."""
    with storage.replacing(str(path)) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
