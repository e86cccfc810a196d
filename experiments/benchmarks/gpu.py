"""All figures of a GPU in one run: training, populations, sampling, and the share of what the device can do.

python experiments/benchmarks/gpu.py                          # on a machine with a GPU; minutes
python experiments/benchmarks/gpu.py --device cpu --smoke     # that it runs, anywhere
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import add_arguments, interleave, report
from problem import pendulum
from reference import BATCH_SIZE
from sampling import measure_sampling, samplers
from training import CONFIGS, Variant, population_variant, table, variants

from invdyn.training.compiled import has_compiler
from invdyn.training.run_config import resolve_device
from invdyn.transitions.store import TransitionStore

POPULATIONS, SMOKE_POPULATIONS = (8, 32, 256), (2,)
SAMPLED = {1: 200, 1000: 200, 100_000: 20, 1_000_000: 5}  # rows: calls of ours in a round
SMOKE_SAMPLED = {1: 20, 100: 20}
SMOKE_EPISODES = 400
MATRIX, SMOKE_MATRIX = 8192, 256
FLOPS_PER_PARAMETER = 6  # two for the forward product of each weight, four for its gradients


def seconds_on(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Return the clock of a device: CUDA events around all that a call queues, or wall time on a CPU."""

    def wall(run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def events(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3

    return events if device.type == "cuda" else wall


def peak_flops(device: torch.device, size: int, dtype: torch.dtype, rounds: int) -> float:
    """Return the FLOP/s of one large product, the practical limit for networks made of products."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = interleave({"product": lambda: a @ b}, rounds, seconds_on(device))["product"]
    return 2.0 * size**3 / min(times)


def training_rows(
    store: TransitionStore, device: torch.device, populations: tuple[int, ...], rounds: int, peak: float, compiled: bool
) -> list[dict[str, object]]:
    """Return samples/s, the ratio to the device's own reference run, and the share of the device's FLOP/s."""
    found: dict[str, Variant] = variants(store, device, populations, compiled=compiled)
    if compiled and device.type == "cuda":
        name = f"default model, population of {populations[-1]}, bfloat16"
        found[name] = population_variant(
            store, CONFIGS["default model"], device, populations[-1], precision=torch.bfloat16
        )
    times = interleave({name: variant.run for name, variant in found.items()}, rounds, seconds_on(device))
    rows = table(found, times, "samples/s")
    for row in rows:
        flops = FLOPS_PER_PARAMETER * float(str(row["parameters"])) * float(str(row["samples/s"]))
        row["share of float32 limit"] = flops / peak
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    parser.add_argument("--smoke", action="store_true", help="shrink the work to seconds on a CPU")
    parser.add_argument("--no_compile", action="store_true", help="leave out the variants that need a compiler")
    args = parser.parse_args()
    device = resolve_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    clock = seconds_on(device)
    compiled = not args.no_compile and has_compiler(device)
    peak = peak_flops(device, SMOKE_MATRIX if args.smoke else MATRIX, torch.float32, args.rounds)
    print(f"{name}: {peak / 1e12:.3g} TFLOP/s in one float32 product", flush=True)
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as folder:
        store = pendulum(folder, SMOKE_EPISODES if args.smoke else None)
        populations = SMOKE_POPULATIONS if args.smoke else POPULATIONS
        rows = training_rows(store, device, populations, args.rounds, peak, compiled)
        report("gpu_training", f"training at batch {BATCH_SIZE} on {name}", rows, args.output)
        found = samplers(device, Path(folder), compiled=compiled)
        sampled = SMOKE_SAMPLED if args.smoke else SAMPLED
        sampling = [
            row
            for batch, calls in sampled.items()
            for row in measure_sampling(found, batch, calls, device, args.rounds, clock)
        ]
    report("gpu_sampling", f"sampling one action per row on {name}", sampling, args.output)


if __name__ == "__main__":
    main()
