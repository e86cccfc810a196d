"""The place of a process among those that train together, and how they stop together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from invdyn.errors import InvdynError
from invdyn.models.base import InverseDynamics

Metrics = dict[str, float]


def raise_own(error: InvdynError | None) -> None:
    """Raise the error of the only worker, if it has one."""
    if error is not None:
        raise error


@dataclass(frozen=True)
class Worker:
    """The place of this process among those that train together.

    Attributes:
        device: where it trains.
        rank: its number; rank 0 tracks and writes checkpoints.
        world_size: how many there are.
        on_machine: how many of them share this machine's memory.
        wrap: makes a module average its gradients over the workers.
        mean: averages a scalar tensor over the workers.
        agree: called by all workers at the same points, with the error of this one; raises the first error on all.
        on_metrics: called on rank 0 with each row of metrics; may raise to stop the run.
        on_trained: called on rank 0 with the finished model; what it returns goes to the run's W&B summary.
        on_diverged: called with the error of a run of a population, at once: the others go on.
        echo: print console lines.
        hosts: names of the nodes of all workers, by rank.
        job: names the command that they belong to.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    on_machine: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    mean: Callable[[Tensor], Tensor] = lambda value: value
    agree: Callable[[InvdynError | None], None] = raise_own
    on_metrics: Callable[[Metrics], None] = lambda metrics: None
    on_trained: Callable[[InverseDynamics], Metrics] = lambda model: {}
    on_diverged: Callable[[InvdynError], None] = lambda error: None
    echo: bool = True
    hosts: tuple[str, ...] = ()
    job: str = ""


@contextmanager
def stopping_together(worker: Worker) -> Iterator[None]:
    """Pass an error of one worker on to all: none may wait in the next all-reduce for one that has left."""
    own: InvdynError | None = None
    try:
        yield
    except InvdynError as error:
        own = error
    worker.agree(own)
