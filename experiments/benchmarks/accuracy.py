"""Error and sampling time on one problem: every recipe trained for the same CPU time on one thread.

Our steps are compiled; the time of compiling is not counted. The reference's loop is as it is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budget import train_within
from measure import add_arguments, cpu_seconds, interleave, ratio, report
from problem import ROOT, problem, tensors
from problems import PROBLEMS
from reference import NUM_STEPS, ReferenceLoop
from torch import Tensor

from invdyn.evaluation.evaluate import linear_baseline
from invdyn.evaluation.metrics import flat_actions, nrmse, varying_std
from invdyn.models.registry import load_model_config
from invdyn.transitions.store import TransitionStore

BUDGET_S = 12.0
SAMPLED = 1000
REFERENCE_CHUNK = 100
ONE_STEP: dict[str, Any] = {"solver": "euler", "num_inference_steps": 1}
TWO_STEPS: dict[str, Any] = {"solver": "euler", "num_inference_steps": 2}


def train_reference(store: TransitionStore, budget_s: float, seed: int) -> ReferenceLoop:
    """Run the reference loop until its CPU time is used up."""
    torch.manual_seed(seed)
    loop = ReferenceLoop(*tensors(store, "train"))
    started = cpu_seconds()
    while cpu_seconds() - started < budget_s:
        loop.train(REFERENCE_CHUNK)
    return loop


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--problem", choices=PROBLEMS, default="pendulum_integrable")
    parser.add_argument("--config", default="pendulum_flow.yaml", help="of the flow; flow.yaml suits robots")
    parser.add_argument("--episodes", type=int, help="episodes to record (default: the dataset config's)")
    parser.add_argument("--budget_s", type=float, default=BUDGET_S, help="CPU seconds of training for each recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile (where there is no compiler)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs = [load_model_config(ROOT / "configs" / "inverse_dynamics" / name) for name in (args.config, "mlp.yaml")]
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as folder:
        store = problem(args.problem, folder, args.episodes)
        state, action, next_state = tensors(store, "test")
        std = varying_std(store.moments, slice(2 * store.state_dim, None))

        def error(predict: Callable[[], Tensor]) -> float:
            torch.manual_seed(0)
            return nrmse(flat_actions(predict().numpy()), flat_actions(action.numpy()), std)

        linear = linear_baseline(store)
        errors: dict[str, list[float]] = {}
        first, first_next = state[:SAMPLED], next_state[:SAMPLED]
        speed: dict[str, Callable[[], object]] = {}
        for seed in range(args.seeds):
            reference = train_reference(store, args.budget_s, seed)
            flow, mlp = (
                train_within(config, store, args.budget_s, seed, Path(folder), compiled=not args.eager).model
                for config in configs
            )
            predictors: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
                f"reference, {NUM_STEPS} steps": reference.sample,
                "reference, 4 steps": lambda s, n, model=reference: model.sample(s, n, 4),
                f"{configs[0].name}, 1 step": lambda s, n, model=flow: model.sample(s, n, **ONE_STEP)[0],
                f"{configs[0].name}, 2 steps": lambda s, n, model=flow: model.sample(s, n, **TWO_STEPS)[0],
                f"{configs[0].name}, chosen": lambda s, n, model=flow: model.sample(s, n)[0],
                "linear base + MLP regression": lambda s, n, model=mlp: model.sample(s, n)[0],
                "linear inverse": lambda s, n: linear.sample(s, n)[0],
            }
            for name, predict in predictors.items():
                errors.setdefault(name, []).append(error(lambda predict=predict: predict(state, next_state)))
                speed[name] = lambda predict=predict: [predict(first, first_next) for _ in range(3)]
        times = interleave(speed, args.rounds)
    slowest = times[f"reference, {NUM_STEPS} steps"]
    rows = [
        {
            "model": name,
            "RMSE/std, mean": float(np.mean(values)),
            "spread (max - min)": float(np.ptp(values)),
            f"ms for {SAMPLED:,}": 1e3 * statistics.median(times[name]) / 3,
            f"x faster than {NUM_STEPS} steps": ratio(slowest, times[name]),
        }
        for name, values in errors.items()
    ]
    title = (
        f"{args.problem}, test split, one sample; {args.budget_s:g} CPU-seconds each (compiling not counted), one "
        f"thread, {args.seeds} seeds"
    )
    report("accuracy", title, rows, args.output)


if __name__ == "__main__":
    main()
