"""The doctor's pictures, as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from invdyn.doctor.examine import Diagnosis
from invdyn.doctor.identifiability import Identifiability
from invdyn.doctor.lag import UNKNOWN, Lag
from invdyn.evaluation.plots import COLORS, FAINT, INK, SPLIT_COLORS, log_scale, make_figure, save_figure

MAX_BARS = 32
AS_GOOD_AS_NOTHING = 1e-8
LIGHT_TEXT_BELOW = 0.55


def draw_all(diagnosis: Diagnosis, folder: Path) -> list[tuple[Path, str]]:
    """Draw what there is to draw; return the paths and what each picture shows."""
    pictures = []
    if diagnosis.lag is not None:
        path = folder / "lag.png"
        plot_lag(diagnosis.lag, path)
        caption = "How much of the action the states around a later or earlier step leave unexplained. Lowest at 0: "
        pictures.append((path, caption + "the action acts in its own row. Thin: each dimension."))
    if diagnosis.identifiability is not None:
        path = folder / "windows.png"
        plot_grid(diagnosis.identifiability, path)
        pictures.append((path, "What other windows would leave unexplained (framed: the configured one)."))
        path = folder / "unexplained.png"
        plot_unexplained(diagnosis.identifiability, path)
        pictures.append((path, "What the configured window leaves unexplained of each action dimension."))
    if len(diagnosis.step_sizes):
        path = folder / "steps.png"
        plot_steps(diagnosis, path)
        pictures.append((path, "Size of each step: root mean square over the state, in standard deviations."))
    if diagnosis.shifts:
        path = folder / "splits.png"
        plot_shifts(diagnosis, path)
        pictures.append((path, "Largest difference between the cumulative distributions of train and another split."))
    if diagnosis.at_bounds.size:
        path = folder / "bounds.png"
        plot_bounds(diagnosis, path)
        pictures.append((path, "Rows exactly at the lowest and highest value of each action dimension."))
    return pictures


def plot_lag(lag: Lag, path: Path) -> None:
    """Draw the unexplained share against the shift."""
    figure, (axes,) = make_figure(1, width=5.2, height=3.4)
    shares = np.maximum(lag.unexplained, AS_GOOD_AS_NOTHING)
    shown = np.flatnonzero(np.isfinite(shares).all(axis=0))[:MAX_BARS]
    for dim in shown:
        axes.plot(lag.shifts, shares[:, dim], color=FAINT, linewidth=0.8, zorder=1)
    curve = np.maximum(lag.mean_curve, AS_GOOD_AS_NOTHING)
    axes.plot(lag.shifts, curve, color=COLORS[0], marker="o", markersize=4, linewidth=1.6, zorder=3, label="mean")
    steps = lag.steps
    label = f"lag {steps:+d}" if steps else "lag 0"
    axes.axvline(steps, color=COLORS[1], linestyle="--", linewidth=1.1, zorder=2, label=label)
    beyond = int(((lag.best != UNKNOWN) & lag.at_edge).sum())
    axes.set_xticks(lag.shifts, [f"{shift:+d}" if shift else "0" for shift in lag.shifts])
    axes.set_xlabel("step that the action is explained by" + (f" ({beyond} dimensions: beyond)" if beyond else ""))
    axes.set_ylabel("unexplained share of the variance")
    log_scale(axes, [*curve, *shares[:, shown].ravel()])
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    save_figure(figure, path)


def plot_grid(found: Identifiability, path: Path) -> None:
    """Draw the unexplained share of each window as a table of colours."""
    gaps = sorted({gap for gap, _ in found.grid})
    histories = sorted({history for _, history in found.grid})
    values = np.array([[found.grid[gap, history] for gap in gaps] for history in histories])
    logs = np.log10(np.maximum(values, 1e-16))
    figure, (axes,) = make_figure(1, width=max(4.2, 1.1 + 0.61 * len(gaps)), height=1.5 + 0.5 * len(histories))
    axes.grid(visible=False)
    axes.imshow(logs, cmap="Blues", aspect="auto")
    middle = logs.min() + LIGHT_TEXT_BELOW * (logs.max() - logs.min())
    for row, column in np.ndindex(values.shape):
        color = "white" if logs[row, column] > middle else INK
        axes.text(column, row, _short(float(values[row, column])), ha="center", va="center", fontsize=7.5, color=color)
    x, y = gaps.index(found.window.gap), histories.index(found.window.history)
    axes.add_patch(_frame(x, y))
    axes.set_xticks(range(len(gaps)), [str(gap) for gap in gaps])
    axes.set_yticks(range(len(histories)), [str(history) for history in histories])
    axes.set_xlabel("gap")
    axes.set_ylabel("history")
    save_figure(figure, path)


def plot_unexplained(found: Identifiability, path: Path) -> None:
    """Draw the unexplained share of each action dimension as bars."""
    linear, neighbours = (np.maximum(values, AS_GOOD_AS_NOTHING) for values in (found.linear, found.neighbours))
    dims = np.flatnonzero(np.isfinite(linear))
    dims = dims[:MAX_BARS]
    figure, (axes,) = make_figure(1, width=max(4.2, 1.5 + 0.3 * len(dims)), height=3.2)
    positions = np.arange(len(dims))
    axes.bar(positions - 0.2, linear[dims], 0.4, color=COLORS[0], label="linear inverse")
    axes.bar(positions + 0.2, neighbours[dims], 0.4, color=COLORS[1], label="with nearest neighbours")
    axes.set_xticks(positions, [str(dim) for dim in dims])
    axes.set_xlabel("action dimension" + _rest(int(np.isfinite(linear).sum()), len(dims)))
    axes.set_ylabel("unexplained share of the variance")
    log_scale(axes, [*linear[dims], *neighbours[dims]])
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    save_figure(figure, path)


def plot_steps(diagnosis: Diagnosis, path: Path) -> None:
    """Draw how large the steps are, jumps in another colour."""
    sizes = diagnosis.step_sizes
    moving = sizes[sizes > 0]
    figure, (axes,) = make_figure(1, width=5.2, height=3.2)
    if len(moving):
        low = max(moving.min(), moving.max() * 1e-6)
        edges = np.geomspace(low * 0.98, moving.max() * 1.02, 61).tolist()
        jumps = np.isin(np.arange(len(sizes)), diagnosis.jumps)
        axes.hist(sizes[~jumps & (sizes > 0)], bins=edges, color=COLORS[0], label="steps")
        if jumps.any():
            axes.hist(sizes[jumps], bins=edges, color=COLORS[1], label=f"jumps ({int(jumps.sum()):,})")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    axes.set_xlabel("step size (standard deviations)" + _zeros(len(sizes) - len(moving)))
    axes.set_ylabel("steps")
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    save_figure(figure, path)


def plot_shifts(diagnosis: Diagnosis, path: Path) -> None:
    """Draw the Kolmogorov-Smirnov distance of each column, for each split."""
    columns = (*diagnosis.names.state, *diagnosis.names.action)
    largest = np.max([shift.ks for shift in diagnosis.shifts], axis=0)
    dims = np.sort(np.argsort(-largest, kind="stable")[:MAX_BARS])
    figure, (axes,) = make_figure(1, width=max(4.2, 1.5 + 0.34 * len(dims)), height=3.6)
    width = 0.8 / len(diagnosis.shifts)
    for index, shift in enumerate(diagnosis.shifts):
        offset = (index - (len(diagnosis.shifts) - 1) / 2) * width
        label = f"{shift.split} ({shift.num_episodes:,} episodes; p = {shift.p_value:.2g})"
        axes.bar(np.arange(len(dims)) + offset, shift.ks[dims], width, color=SPLIT_COLORS[shift.split], label=label)
    axes.set_xticks(range(len(dims)), [columns[dim] for dim in dims], rotation=60, ha="right", rotation_mode="anchor")
    axes.set_ylabel("Kolmogorov-Smirnov distance")
    axes.set_ylim(0, min(1.0, max(0.2, 1.1 * float(largest.max()))))
    axes.set_xlabel(_rest(len(columns), len(dims)).strip())
    axes.legend(frameon=False, fontsize=7.5, loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    save_figure(figure, path)


def plot_bounds(diagnosis: Diagnosis, path: Path) -> None:
    """Draw the share of rows at each bound of each action dimension."""
    shares = diagnosis.at_bounds
    dims = np.flatnonzero(shares.sum(axis=0) < 2.0)[:MAX_BARS]  # both bounds in all rows: a constant
    figure, (axes,) = make_figure(1, width=max(4.2, 1.5 + 0.3 * len(dims)), height=3.2)
    axes.bar(range(len(dims)), shares[0, dims], 0.7, color=COLORS[0], label="lowest")
    axes.bar(range(len(dims)), shares[1, dims], 0.7, bottom=shares[0, dims], color=COLORS[1], label="highest")
    axes.set_xticks(range(len(dims)), [str(dim) for dim in dims])
    axes.set_xlabel("action dimension" + _rest(int((shares.sum(axis=0) < 2.0).sum()), len(dims)))
    axes.set_ylabel("share of the rows")
    axes.set_ylim(0, max(0.05, 1.1 * float(shares[:, dims].sum(axis=0).max(initial=0.0))))
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    save_figure(figure, path)


def _frame(column: int, row: int) -> Rectangle:
    return Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, fill=False, edgecolor=COLORS[1], linewidth=2)


def _short(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _rest(total: int, shown: int) -> str:
    return f" ({total - shown} of {total} not shown)" if total > shown else ""


def _zeros(count: int) -> str:
    return f"; {count:,} steps of size 0 not shown" if count else ""
