"""What students of few evaluations give and cost: beside the flow, as it samples by default, whose students they are.

The flow is trained for a budget of CPU time on one thread; what its students take comes on top and is their column.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budget import train_within
from leaderboard_scores import held_out, judge, predict
from measure import RESULTS, cpu_seconds, report
from problem import ROOT, problem
from problems import PROBLEMS

from invdyn.models.base import InverseDynamics
from invdyn.models.flow import FlowInverseDynamics
from invdyn.models.registry import load_model_config
from invdyn.training.batches import count_steps
from invdyn.training.checkpoint import load_model
from invdyn.training.student import train_student
from invdyn.training.validation import Validation

BUDGET_S = 12.0
SCORES = {
    "network evaluations": "network_evaluations",
    "energy score": "energy_score",
    "in 90% region": "coverage_90",
    "C2ST": "c2st",
    "force error": "force_error",
    "us per action": "us_per_action",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: runs/benchmarks)")
    parser.add_argument("--problem", choices=PROBLEMS, default="pendulum_two_factor")
    parser.add_argument("--config", default="many_valued_flow.yaml", help="of the flow; flow.yaml suits robots")
    parser.add_argument("--episodes", type=int, help="episodes to record (default: the dataset config's)")
    parser.add_argument("--budget_s", type=float, default=BUDGET_S, help="CPU seconds of training the flow")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 2, 1], help="Euler steps of each student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile (where there is no compiler)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_model_config(ROOT / "configs" / "inverse_dynamics" / args.config)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as folder:
        store = problem(args.problem, folder, args.episodes)
        rows = held_out(store, "test")

        def add(name: str, model: InverseDynamics, seed: int, cpu_s: float) -> None:
            found.setdefault(name, []).append({**judge(predict(model, rows, seed), rows, seed), "cpu_s": cpu_s})

        for seed in range(args.seeds):
            trained = train_within(config, store, args.budget_s, seed, Path(folder), compiled=not args.eager)
            flow, run = trained.model, trained.run
            assert isinstance(flow, FlowInverseDynamics), args.config
            add("flow, as chosen", flow, seed, trained.cpu_s)
            flow_steps = trained.epochs * count_steps(store.num_rows("train"), run.training.batch_size)
            validation = Validation.load(flow, store, run, flow.device)
            for steps in args.steps:
                own = run.replace(training=run.training.replace(student_steps=steps))
                started = cpu_seconds()
                where = train_student(own, flow, store, validation, flow_steps)
                taken = cpu_seconds() - started
                add(f"student, {steps} step(s)", load_model(where), seed, taken)
                shutil.rmtree(where)
    table = [
        {
            "model": name,
            "CPU-s": float(np.mean([each["cpu_s"] for each in runs])),
            **{title: _mean([each[key] for each in runs]) for title, key in SCORES.items()},
            "energy score, max - min": float(np.ptp([each["energy_score"] for each in runs])),
        }
        for name, runs in found.items()
    ]
    title = f"{args.problem}, {args.config}, test split, mean of {args.seeds} seeds; one thread"
    report("students", title, table, args.output)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


if __name__ == "__main__":
    main()
