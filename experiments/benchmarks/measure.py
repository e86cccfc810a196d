"""How the benchmarks measure: variants in turn, CPU time, medians, and where it was."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROUNDS = 5
RESULTS = Path(__file__).resolve().parent.parent.parent / "runs" / "benchmarks"

Row = Mapping[str, Any]


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    seconds: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Run every variant once per round, after one round to warm up.

    Args:
        variants: what to run, by name.
        rounds: timed rounds.
        seconds: runs a variant and returns its time; CPU seconds (user and system, children included) when None.

    Returns:
        Seconds of each round, by variant.
    """
    seconds = seconds or cpu_seconds_of
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            spent = seconds(run)
            if number:
                times[name].append(spent)
    return times


def cpu_seconds_of(run: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    started = cpu_seconds()
    run()
    return cpu_seconds() - started


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the median over rounds of slow / fast: what a busy machine does to a round, it does to both."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def cpu_seconds() -> float:
    """Return the CPU time of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def machine() -> dict[str, str]:
    """Return where a figure was measured."""
    from invdyn.training.run_config import current_versions

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": f"{model}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d"), **current_versions()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every benchmark takes."""
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: runs/benchmarks)")


def report(name: str, title: str, rows: Sequence[Row], output: Path) -> None:
    """Print one table and write it as JSON."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, ["-" * width for width in widths], *cells]:
        padded = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(padded))
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.json"
    path.write_text(json.dumps({"title": title, "machine": machine(), "rows": list(rows)}, indent=1), encoding="utf-8")
    print(f"written: {path}", flush=True)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
