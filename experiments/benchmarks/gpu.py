"""All figures of a GPU in one run: training, populations, sampling, and the share of what the device can do.

python experiments/benchmarks/gpu.py                          # on a machine with a GPU; minutes
python experiments/benchmarks/gpu.py --device cpu --smoke     # that it runs, anywhere
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from measure import add_arguments, interleave, report
from problem import pendulum
from reference import BATCH_SIZE
from sampling import STATE_DIM, Sample, measure_sampling, repeat, samplers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training import CONFIGS, Variant, population_variant, table, variants

from invdyn.training.compiled import has_compiler
from invdyn.training.run_config import resolve_device
from invdyn.transitions.store import TransitionStore

POPULATIONS, SMOKE_POPULATIONS = (8, 32, 256), (2,)
SAMPLED = {1: 20, 1000: 20, 100_000: 20, 1_000_000: 5}  # rows: calls of ours in a round
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


@dataclass(frozen=True)
class Kernels:
    """What a device ran.

    Attributes:
        count: kernels and copies.
        seconds: of their own, without what lies between them.
    """

    count: int
    seconds: float


def kernels_of(run: Callable[[], object], device: torch.device) -> Kernels | None:
    """Return what a call runs on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize(device)
    events = [event for event in found.events() or () if event.device_type == DeviceType.CUDA]
    return Kernels(len(events), 1e-6 * sum(event.time_range.elapsed_us() for event in events))


def limits(kernels: Kernels | None, calls: int, seconds: float) -> dict[str, float]:
    """Return the columns that say whether a device waits: kernels per call, and their share of the time."""
    if kernels is None:
        return {}
    return {"kernels": kernels.count / calls, "share of time in kernels": kernels.seconds / seconds}


def fill_compiler_cache(makers: Mapping[str, Callable[[], Variant]]) -> None:
    """Run each variant once, in as many processes as there are cores: later the code is found in the compiler's cache.

    A graph takes half a minute to compile for a GPU, and there is one for each stage of each variant.
    """
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _compile_alone) as pool:
        for done in as_completed([pool.submit(_run_once, name, make) for name, make in makers.items()]):
            print(done.result(), file=sys.stderr, flush=True)


def _compile_alone() -> None:
    torch._inductor.config.compile_threads = 1
    torch.set_num_threads(1)


def _run_once(name: str, make: Callable[[], Variant]) -> str:
    started = time.perf_counter()
    make().run()
    return f"{name}: first round took {time.perf_counter() - started:.0f} s, compiling included"


def training_rows(
    store: TransitionStore, device: torch.device, populations: tuple[int, ...], rounds: int, peak: float, compiled: bool
) -> list[dict[str, object]]:
    """Return samples/s, the ratio to the device's own reference run, and the share of the device's FLOP/s."""
    makers = variants(store, device, populations, compiled=compiled)
    if compiled and device.type == "cuda":
        largest = partial(population_variant, store, CONFIGS["default model"], device, populations[-1])
        makers[f"default model, population of {populations[-1]}, bfloat16"] = partial(largest, precision=torch.bfloat16)
    if compiled:
        fill_compiler_cache(makers)
    found = {name: make() for name, make in makers.items()}
    times = interleave({name: variant.run for name, variant in found.items()}, rounds, seconds_on(device))
    rows = table(found, times, "samples/s")
    for row, variant, spent in zip(rows, found.values(), times.values(), strict=True):
        flops = FLOPS_PER_PARAMETER * float(str(row["parameters"])) * float(str(row["samples/s"]))
        row["us per step"] = 1e6 * median(spent) / variant.steps
        row["share of float32 limit"] = flops / peak
        row.update(limits(kernels_of(variant.run, device), variant.steps, median(spent)))
    return rows


def sampling_rows(
    found: dict[str, Sample], batch: int, calls: int, device: torch.device, rounds: int
) -> list[dict[str, object]]:
    """Return the rows of `measure_sampling` at one batch size, with what the device ran."""
    rows = measure_sampling(found, batch, calls, device, rounds, seconds_on(device))
    state, next_state = torch.randn(2, batch, STATE_DIM, device=device)
    for row, sample in zip(rows, found.values(), strict=True):
        kernels = kernels_of(repeat(sample, state, next_state, 1), device)
        row.update(limits(kernels, 1, 1e-6 * float(str(row["us per call"]))))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    parser.add_argument("--transitions", type=Path, help="an extracted pendulum_integrable (default: record it)")
    parser.add_argument("--smoke", action="store_true", help="shrink the work to seconds on a CPU")
    parser.add_argument("--part", choices=("training", "sampling"), help="measure this alone")
    parser.add_argument("--no_compile", action="store_true", help="leave out the variants that need a compiler")
    args = parser.parse_args()
    device = resolve_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    compiled = not args.no_compile and has_compiler(device)
    peak = peak_flops(device, SMOKE_MATRIX if args.smoke else MATRIX, torch.float32, args.rounds)
    print(f"{name}: {peak / 1e12:.3g} TFLOP/s in one float32 product", flush=True)
    with tempfile.TemporaryDirectory(prefix="invdyn-bench-") as folder:
        episodes = SMOKE_EPISODES if args.smoke else None
        store = TransitionStore(args.transitions) if args.transitions else pendulum(folder, episodes)
        if args.part != "sampling":
            populations = SMOKE_POPULATIONS if args.smoke else POPULATIONS
            rows = training_rows(store, device, populations, args.rounds, peak, compiled)
            report("gpu_training", f"training at batch {BATCH_SIZE} on {name}", rows, args.output)
        if args.part == "training":
            return
        found = samplers(device, Path(folder), compiled=compiled)
        sampled = SMOKE_SAMPLED if args.smoke else SAMPLED
        for batch, calls in sampled.items():
            rows = sampling_rows(found, batch, calls, device, args.rounds)
            title = f"sampling one action per row, batches of {batch:,}, on {name}"
            report(f"gpu_sampling_{batch}", title, rows, args.output)


if __name__ == "__main__":
    main()
