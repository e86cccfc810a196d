"""Train a model config for as long as a budget of CPU time lasts. The steps are compiled, except the reference's.

What compiling costs depends on the shape of a model alone and is paid once: it is measured and kept apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import cpu_seconds
from torch import Tensor

from invdyn.models.base import InverseDynamics
from invdyn.models.registry import ModelConfig, build_model
from invdyn.training.checkpoint import load_model
from invdyn.training.compiled import CompiledStep
from invdyn.training.distributed import train
from invdyn.training.run_config import RunConfig, TrackingConfig
from invdyn.transitions.store import TransitionStore

PROBE_EPOCHS = 3
VAL_ROWS = 1024


@dataclass(frozen=True)
class Trained:
    """A trained model and what it cost.

    Attributes:
        model: in eval mode.
        run: that trained it.
        epochs: passes over the training rows; 0 for a model without steps.
        cpu_s: CPU time of the training itself: loading of the rows, steps and the checkpoint.
        compile_cpu_s: CPU time of compiling the step, which is not in `cpu_s`.
    """

    model: InverseDynamics
    run: RunConfig
    epochs: int
    cpu_s: float
    compile_cpu_s: float


def train_within(
    config: ModelConfig,
    store: TransitionStore,
    budget_s: float,
    seed: int,
    folder: Path,
    *,
    compiled: bool,
    share: float = 1.0,
) -> Trained:
    """Train for as many whole epochs as fit the CPU time, at least one; the speed is probed first, in a run of its own.

    The number of epochs must be known at the start, because the learning rate falls over the whole run. Models without
    steps are fitted once, whatever that costs.

    Args:
        config: the model.
        store: the dataset.
        budget_s: CPU seconds, the cost of what is not steps included.
        seed: of the run.
        folder: for its files.
        compiled: whether the steps are compiled.
        share: of the epochs that the budget buys: a run to choose hyperparameters by takes fewer.
    """
    folder = folder / f"{config.name}-{seed}"
    if compiled:
        torch.compile(torch.nn.Identity())  # its first use imports for seconds
    run = RunConfig.for_dataset(
        store,
        folder / "probe",
        model=config,
        training=config.training.replace(num_epochs=PROBE_EPOCHS, seed=seed),
        device="cpu",
        val_rows=VAL_ROWS,
        checkpoints=1,
        compile=compiled,
        tracking=TrackingConfig(mode="disabled"),
    )
    probe = _timed(run)
    if not build_model(run.model, store.state_dim, store.action_dim, store.history, store.horizon).trainable:
        return Trained(load_model(run.run_dir).eval(), run, 0, probe.cpu_s, 0.0)
    epochs = max(1, round(share * (budget_s - probe.other_s) / probe.epoch_s))
    run = run.replace(run_dir=str(folder / "full"), training=run.training.replace(num_epochs=epochs))
    full = _timed(run)
    return Trained(
        load_model(run.run_dir).eval(), run, epochs, full.cpu_s, max(probe.compile_cpu_s, full.compile_cpu_s)
    )


@dataclass(frozen=True)
class _Costs:
    """CPU seconds of a run: all but the compiling, one epoch, what is not epochs, and the compiling."""

    cpu_s: float
    epoch_s: float
    other_s: float
    compile_cpu_s: float


def _timed(run: RunConfig) -> _Costs:
    epochs = run.training.num_epochs
    with _compiled_calls() as calls:
        started, compilers = time.process_time(), cpu_seconds() - time.process_time()
        train(run, local=True)
        spent = time.process_time() - started
        compilers = cpu_seconds() - time.process_time() - compilers  # the compilers are children
    if not calls:
        return _Costs(spent, spent / epochs, 0.0, 0.0)
    # The first call of each compiled step compiles it; its batches are few.
    first = {call.step: call for call in reversed(calls)}
    last = {call.step: call for call in calls}
    compiling = sum(call.end - call.begin for call in first.values())
    steps, timed = (sum(call.batches for call in each) for each in (calls, set(calls) - set(first.values())))
    seconds = sum(last[step].end - first[step].end for step in first)
    epoch_s = seconds / max(timed, 1) * steps / epochs
    spent -= compiling
    return _Costs(spent, epoch_s, spent - epochs * epoch_s, compiling + compilers)


@dataclass(frozen=True)
class _Call:
    """A call of a compiled step: CPU seconds at begin and end, and batches."""

    step: CompiledStep
    begin: float
    end: float
    batches: int


@contextmanager
def _compiled_calls() -> Iterator[list[_Call]]:
    """Collect the calls of all compiled steps."""
    found: list[_Call] = []
    call = CompiledStep.__call__

    def timed(step: CompiledStep, coefficients: Tensor, chunk: tuple[Tensor, ...]) -> Tensor:
        started = time.process_time()
        losses = call(step, coefficients, chunk)
        found.append(_Call(step, started, time.process_time(), len(coefficients)))
        return losses

    CompiledStep.__call__ = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CompiledStep.__call__ = call  # type: ignore[method-assign]
