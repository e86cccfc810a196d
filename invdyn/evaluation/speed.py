"""How fast models predict: wall time of `sample`, all variants in turn so that a busy machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LARGE_BATCH = 1000
REPEATS = {1: 15, LARGE_BATCH: 5}
"""Batch size to number of timed calls; the median is reported."""


@dataclass(frozen=True)
class Speed:
    """Medians of wall time, one sample per transition.

    Attributes:
        latency_ms_batch_1: one action, in milliseconds.
        latency_ms_batch_1000: a thousand actions at once, in milliseconds.
        actions_per_s: throughput at a batch of a thousand.
    """

    latency_ms_batch_1: float
    latency_ms_batch_1000: float
    actions_per_s: float


def measure_speed(variants: Mapping[str, Callable[[int], object]], device: torch.device) -> dict[str, Speed]:
    """Time each variant at batch 1 and batch 1000.

    Args:
        variants: name to a function that predicts a batch of the given size.
        device: waited for after each call when it runs on its own.
    """
    medians = {batch: _medians(variants, batch, repeats, device) for batch, repeats in REPEATS.items()}
    return {
        name: Speed(
            latency_ms_batch_1=1e3 * medians[1][name],
            latency_ms_batch_1000=1e3 * medians[LARGE_BATCH][name],
            actions_per_s=LARGE_BATCH / medians[LARGE_BATCH][name],
        )
        for name in variants
    }


def _medians(
    variants: Mapping[str, Callable[[int], object]], batch: int, repeats: int, device: torch.device
) -> dict[str, float]:
    """Return seconds per call: rounds over all variants, the first round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, predict in variants.items():
            times[name].append(_seconds(predict, batch, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _seconds(predict: Callable[[int], object], batch: int, device: torch.device) -> float:
    start = time.perf_counter()
    predict(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
