"""Sampling time of the default model against the reference's 100 Euler steps; for the errors, see accuracy.py."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import add_arguments, interleave, ratio, report
from problem import ROOT
from reference import NUM_STEPS, ReferenceLoop
from torch import Tensor

from invdyn.models.base import InverseDynamics
from invdyn.models.registry import build_model, load_model_config
from invdyn.training.export import export_model

STATE_DIM, ACTION_DIM = 4, 1
BATCHES = {1: 300, 1000: 20}  # rows: calls of ours in a round
STEP_COUNTS = (1, 2)

Sample = Callable[[Tensor, Tensor], Tensor]


def samplers(device: torch.device, folder: Path, *, compiled: bool) -> dict[str, Sample]:
    """Return the reference and ours, as the library samples and as an exported program, by name."""
    torch.manual_seed(0)
    rows = torch.randn(64, STATE_DIM), torch.randn(64, ACTION_DIM), torch.randn(64, STATE_DIM)
    found: dict[str, Sample] = {f"reference, {NUM_STEPS} steps": ReferenceLoop(*rows, device).sample}
    config = load_model_config(ROOT / "configs" / "inverse_dynamics" / "pendulum_flow.yaml")
    model = build_model(config, STATE_DIM, ACTION_DIM).to(device).eval()
    for steps in STEP_COUNTS:
        found[f"sample(), {steps} step(s)"] = lambda s, n, k=steps: model.sample(s, n, num_inference_steps=k)[0]
        if compiled:
            found[f"exported (aoti), {steps} step(s)"] = exported(model, steps, folder)
    return found


def exported(model: InverseDynamics, steps: int, folder: Path) -> Sample:
    """Return the machine code of a model, its noise drawn at every call."""
    path = export_model(model, folder / f"{steps}.pt2", "aoti", num_inference_steps=steps)
    program = torch._inductor.aoti_load_package(str(path))

    def sample(state: Tensor, next_state: Tensor) -> Tensor:
        noise = torch.randn(1, len(state), model.noise_dim, device=state.device)
        return program(state, next_state, noise)[0]

    return sample


def repeat(sample: Sample, state: Tensor, next_state: Tensor, calls: int) -> Callable[[], object]:
    """Return a round of calls."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(calls):
                sample(state, next_state)

    return run


def measure_sampling(
    found: dict[str, Sample],
    batch: int,
    calls: int,
    device: torch.device,
    rounds: int,
    seconds: Callable[[Callable[[], object]], float] | None = None,
) -> list[dict[str, object]]:
    """Return a row per sampler at one batch size; the reference makes a twentieth of the calls."""
    state, next_state = torch.randn(2, batch, STATE_DIM, device=device)
    reference = next(iter(found))
    counts = {name: max(1, calls // 20) if name == reference else calls for name in found}
    runs = {name: repeat(sample, state, next_state, counts[name]) for name, sample in found.items()}
    per_call = {
        name: [spent / counts[name] for spent in times] for name, times in interleave(runs, rounds, seconds).items()
    }
    rows = []
    for name, times in per_call.items():
        median = sorted(times)[len(times) // 2]
        speedup = ratio(per_call[reference], times)
        rows.append(
            {
                "sampler": f"{name}, batch {batch:,}",
                "us per call": 1e6 * median,
                "actions/s": batch / median,
                f"x {reference}": speedup,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--no_compile", action="store_true", help="leave out the variants that need a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as folder:
        found = samplers(device, Path(folder), compiled=not args.no_compile)
        rows = [
            row
            for batch, calls in BATCHES.items()
            for row in measure_sampling(found, batch, calls, device, args.rounds)
        ]
    title = f"sampling one action per row, one thread, CPU time, median of {args.rounds} interleaved rounds"
    report("sampling", title, rows, args.output)


if __name__ == "__main__":
    main()
