"""Error and sampling time on the clean pendulum: every recipe trained for the same CPU time on one thread."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import add_arguments, cpu_seconds, interleave, ratio, report
from problem import ROOT, pendulum, tensors
from reference import NUM_STEPS, ReferenceLoop
from torch import Tensor

from invdyn.evaluation.evaluate import linear_baseline
from invdyn.evaluation.metrics import flat_actions, nrmse, varying_std
from invdyn.models.base import InverseDynamics
from invdyn.models.registry import load_model_config
from invdyn.training.checkpoint import load_model
from invdyn.training.distributed import train
from invdyn.training.run_config import RunConfig, TrackingConfig
from invdyn.transitions.store import TransitionStore

BUDGET_S = 12.0
PROBE_EPOCHS = 2
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


def train_ours(store: TransitionStore, config_name: str, budget_s: float, seed: int, folder: Path) -> InverseDynamics:
    """Train a model config for as many epochs as fit the CPU time; its speed is probed first."""
    config = load_model_config(ROOT / "configs" / "inverse_dynamics" / config_name)

    def run(epochs: int, name: str) -> tuple[RunConfig, float]:
        recipe = config.training.replace(num_epochs=epochs, seed=seed)
        tracking = TrackingConfig(mode="disabled")
        run_dir = folder / f"{config.name}-{seed}-{name}"
        started = cpu_seconds()
        run_config = RunConfig.for_dataset(
            store, run_dir, model=config, training=recipe, device="cpu", val_rows=512, checkpoints=1, tracking=tracking
        )
        train(run_config, local=True)
        return run_config, cpu_seconds() - started

    per_epoch = run(PROBE_EPOCHS, "probe")[1] / PROBE_EPOCHS
    run_config, used_s = run(max(1, int(budget_s / per_epoch)), "full")
    print(f"{config.name}: {run_config.training.num_epochs} epochs in {used_s:.1f} CPU-seconds", flush=True)
    return load_model(run_config.run_dir)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--episodes", type=int, help="episodes to record (default: the dataset config's)")
    parser.add_argument("--budget_s", type=float, default=BUDGET_S, help="CPU seconds of training for each recipe")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as folder:
        store = pendulum(folder, args.episodes)
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
            flow = train_ours(store, "pendulum_flow.yaml", args.budget_s, seed, Path(folder))
            mlp = train_ours(store, "mlp.yaml", args.budget_s, seed, Path(folder))
            predictors: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
                f"reference, {NUM_STEPS} steps": reference.sample,
                "reference, 4 steps": lambda s, n, model=reference: model.sample(s, n, 4),
                "pendulum_flow, 1 step": lambda s, n, model=flow: model.sample(s, n, **ONE_STEP)[0],
                "pendulum_flow, 2 steps": lambda s, n, model=flow: model.sample(s, n, **TWO_STEPS)[0],
                "pendulum_flow, chosen": lambda s, n, model=flow: model.sample(s, n)[0],
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
        f"clean pendulum, test split, one sample; {args.budget_s:g} CPU-seconds each, one thread, {args.seeds} seeds"
    )
    report("accuracy", title, rows, args.output)


if __name__ == "__main__":
    main()
