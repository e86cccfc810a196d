"""The leaderboard as one Markdown page and one JSON file, made of all results that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from invdyn.evaluation.intervals import over_seeds
from invdyn.transitions.store import write_json

Result = dict[str, Any]

ROUNDING = 1e-9
"""A spread below this share of the mean is that of equal results, rounded."""

COLUMNS = {
    "energy_score": ("energy score", ".4g"),
    "nrmse": ("RMSE / std", ".4g"),
    "crps": ("CRPS", ".4g"),
    "nll_per_dim": ("NLL per dim", ".3f"),
    "coverage_50": ("in 50% region", ".1%"),
    "coverage_90": ("in 90% region", ".1%"),
    "c2st": ("C2ST", ".3f"),
    "force_error": ("force error", ".3g"),
    "round_trip": ("round trip", ".3g"),
    "network_evaluations": ("NFE", ".0f"),
    "us_per_action": ("us per action", ".3g"),
    "cpu_s": ("CPU-s", ".1f"),
    "compile_cpu_s": ("compile", ".0f"),
}
HEAD = """# Leaderboard

{machine}. Made by `python experiments/benchmarks/leaderboard.py`, which says how to run it in pieces.
**{done} of {total} results (problems x models x 3 seeds) are there**; with few seeds, or less than 12 CPU-seconds, the
order of near models means nothing.

Every model trains for the same CPU time on one thread (column CPU-s: what it really took, rows and checkpoint included;
models without steps are fitted once, and sbi trains two epochs at least, whatever that costs). The steps of invdyn's
models are compiled, except the reference recipe's; compiling a shape (column compile) is paid once and kept apart.
Peers run as their libraries do. Mean over seeds, ± their standard deviation. One sample per
action for RMSE / std, C2ST, force error and round trip; 32 for the rest; 2,000 test rows. A right model has 50% and 90%
in its regions and a C2ST of 0.5 (standard error .008). RMSE / std is the wrong measure where several actions are right:
there the mean of all of them wins. [docs/metrics.md](../metrics.md) explains every column.

Hyperparameters are chosen by the energy score on validation rows, with a third of the steps for each point of a small
grid (`choices/`): two learning rates for networks, ours and theirs; two numbers of neighbours. The flow is the default
recipe (flow.yaml; pendulum_flow.yaml on the pendulums), and many_valued_flow.yaml stands beside it; both, and the
reference recipe, are what they are. Peers (sbi, torchcfm) are trained by their own code on the same rows, with the
features [s, s' - s] and the actions in standard units.

To run it, a piece at a time and at low priority; a result that is there for the same budget and rows is kept:

    make leaderboard-env    # optional: sbi and torchcfm
    nice python experiments/benchmarks/leaderboard.py --problems hopper,pusher --seeds 0 --peers .venv-peers/bin/python
"""


def write_page(output: Path, entries: Mapping[str, Sequence[str]]) -> Path:
    """Write README.md and leaderboard.json into the folder of the results, and return the page's path.

    Args:
        output: folder that holds results/.
        entries: models of each problem.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("results/*/*/seed-*.json"))]
    board = {name: _of_problem(results, name, models) for name, models in entries.items()}
    board = {name: rows for name, rows in board.items() if rows}
    write_json(output / "leaderboard.json", {"machines": _machines(results), "board": board}, indent=1)
    text = HEAD.format(machine=_where(results), done=len(results), total=3 * sum(map(len, entries.values())))
    for name, rows in board.items():
        text += f"\n## {name}\n\n{_table(rows)}"
    page = output / "README.md"
    page.write_text(text, encoding="utf-8")
    return page


def _of_problem(results: Sequence[Result], name: str, models: Sequence[str]) -> list[Result]:
    """Return one row per model, the best energy score first."""
    rows = []
    for model in models:
        found = [result for result in results if (result["problem"], result["model"]) == (name, model)]
        if found:
            rows.append(_row(model, found))
    return sorted(rows, key=lambda row: row["energy_score"]["mean"])


def _row(model: str, found: Sequence[Result]) -> Result:
    row: Result = {"model": model, "seeds": [result["seed"] for result in found]}
    row["budget_s"] = sorted({result["budget_s"] for result in found})
    for name in COLUMNS:
        values = [result[name] for result in found if result.get(name) is not None]
        row[name] = None
        if values:
            spread = over_seeds(values)
            row[name] = {"mean": spread.mean, "std": spread.std if len(values) > 1 else None}
    return row


def _table(rows: Sequence[Result]) -> str:
    columns = [name for name in COLUMNS if any(row[name] for row in rows)]
    lines = [["model", *(COLUMNS[name][0] for name in columns), "seeds"]]
    lines.append(["---", *["---:"] * (len(columns) + 1)])
    lines += [
        [row["model"], *(_cell(row[name], COLUMNS[name][1]) for name in columns), str(len(row["seeds"]))]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Result | None, digits: str) -> str:
    if value is None:
        return ""
    text = f"{value['mean']:{digits}}"
    spread = value["std"]
    if spread is None or not np.isfinite(spread) or spread <= ROUNDING * abs(value["mean"]):
        return text
    return f"{text} ± {spread:{_coarse(digits)}}"


def _coarse(digits: str) -> str:
    return ".2g" if digits.endswith("g") else digits


def _machines(results: Sequence[Result]) -> list[dict[str, str]]:
    unique = {json.dumps(result["machine"], sort_keys=True) for result in results}
    return [json.loads(text) for text in sorted(unique)]


def _where(results: Sequence[Result]) -> str:
    machines = _machines(results)
    parts = [sorted({str(each[key]) for each in machines}) for key in ("cpu", "date", "torch", "commit")]
    cpu, date, torch, commit = (", ".join(part) for part in parts)
    budgets = ", ".join(f"{budget:g}" for budget in sorted({result["budget_s"] for result in results}))
    return f"Budget {budgets} CPU-seconds; {cpu}; {date}; torch {torch}; commit {commit}"
