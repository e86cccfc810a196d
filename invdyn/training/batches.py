"""Shuffled batches of encoded transitions: resident on the training device where they fit, else streamed.

Both give chunks of several batches, so that gathering rows and drawing noise cost one call per chunk, not per step.
The order depends on seed and epoch alone: every worker count sees the same global batches, each rank its share of rows.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.errors import ConfigError, DataError
from invdyn.models.base import InverseDynamics
from invdyn.transitions.store import Part, TransitionStore

STEPS_PER_CHUNK = 64
SHUFFLING_THREADS = 4
CHUNK_ROWS = 131_072
"""Chunks of large batches hold fewer steps: gathered into memory that is fresh each time, they would cost more."""

ENCODE_ROWS = 65_536
ENCODE_ROWS_ON_CPU = 4_096
"""Rows encoded at a time: on a CPU so few that the float64 intermediates stay in its cache."""

STREAM_BLOCK_ROWS = 65_536
STREAM_POOL_BLOCKS = 8
RESIDENT_MEMORY_SHARE = 0.5
MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

Rows = tuple[Float[Tensor, "rows context"], Float[Tensor, "rows target"]]


@dataclass(frozen=True)
class Share:
    """Which rows of every global batch a rank trains on.

    Attributes:
        batch_size: rows of the global batch.
        rank: this worker.
        world_size: number of workers.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < self.world_size:
            raise ConfigError(
                f"batch_size is global and must hold a row for each worker: got {self.batch_size} for "
                f"{self.world_size} workers"
            )

    @property
    def rows(self) -> slice:
        """This rank's rows of a global batch: as many as every other's, or one more."""
        return slice(
            self.rank * self.batch_size // self.world_size, (self.rank + 1) * self.batch_size // self.world_size
        )

    @property
    def loss_weight(self) -> float:
        """What makes the mean over workers of their mean losses the mean over rows; 1 where all have equally many."""
        return float(self.rows.stop - self.rows.start) * self.world_size / self.batch_size

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk of global batches."""
        return self.batch_size * max(1, min(STEPS_PER_CHUNK, CHUNK_ROWS // self.batch_size))

    def of(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of a chunk: (steps * batch_size, ...) to (steps, rows of this rank, ...)."""
        return rows.view(-1, self.batch_size, *rows.shape[1:])[:, self.rows]


class Batches(Protocol):
    """Chunks of shuffled rows of one epoch after another."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; rows that do not fill a last batch are left out of that epoch."""

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """Yield (context, target) of this rank's rows, each (steps, local batch, columns)."""


class ResidentBatches:
    """The whole split in memory on the training device.

    Args:
        rows: encoded (context, target) of the split.
        share: global batch and rank.
        seed: with the epoch, decides the order.
    """

    def __init__(self, rows: Rows, share: Share, seed: int):
        self.context, self.target = rows
        self.share, self.seed = share, seed
        self.steps_per_epoch = count_steps(len(self.context), share.batch_size)

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """Yield the epoch's chunks; see `Batches`."""
        order = epoch_order(len(self.context), self.seed, epoch)
        order = order[: self.steps_per_epoch * self.share.batch_size].to(self.context.device)
        for index in order.split(self.share.chunk_rows):
            mine = self.share.of(index)
            flat = mine.reshape(-1)
            yield self.context[flat].unflatten(0, mine.shape), self.target[flat].unflatten(0, mine.shape)


class PopulationBatches:
    """The whole split in memory, and the batches of several runs at once: each in the order of its own seed.

    Args:
        rows: encoded (context, target) of the split, shared by all.
        batch_size: rows of a batch of one run.
        seeds: of the runs.
    """

    def __init__(self, rows: Rows, batch_size: int, seeds: Sequence[int]):
        self.context, self.target = rows
        self.batch_size, self.seeds = batch_size, seeds
        self.steps_per_epoch = count_steps(len(self.context), batch_size)
        self.steps_per_chunk = Share(batch_size).chunk_rows // batch_size
        self.threads = ThreadPoolExecutor(min(len(seeds), SHUFFLING_THREADS))
        self.drawn: tuple[int, list[Future[Tensor]]] = (-1, [])

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """Yield the epoch's chunks: (context, target), each (steps, runs, batch, columns)."""
        _, orders = self.drawn if self.drawn[0] == epoch else self._draw_orders(epoch)
        # While this epoch is trained: for hundreds of runs on a GPU, their orders take as long as their steps.
        self.drawn = self._draw_orders(epoch + 1)
        index = torch.stack([order.result() for order in orders]).to(self.context.device)
        for chunk in index.unflatten(1, (-1, self.batch_size)).split(self.steps_per_chunk, dim=1):
            by_step = chunk.transpose(0, 1).contiguous()
            yield self.context[by_step], self.target[by_step]

    def _draw_orders(self, epoch: int) -> tuple[int, list[Future[Tensor]]]:
        """Start to draw the order of each run, (rows of whole batches,) int32."""
        rows = self.steps_per_epoch * self.batch_size

        def draw(seed: int) -> Tensor:
            return epoch_order(len(self.context), seed, epoch)[:rows].int()

        return epoch, [self.threads.submit(draw, seed) for seed in self.seeds]


class StreamingBatches:
    """A split that does not fit: shuffled blocks of rows, mixed within a pool of several blocks.

    Every rank reads all blocks (from the page cache where ranks share a machine) and trains on its rows. A thread reads
    and encodes the next pool while the current one is trained on.

    Args:
        store: the dataset.
        model: encodes the rows; a copy of it on the CPU is kept.
        share: global batch and rank.
        seed: with the epoch, decides the order.
        device: where chunks go.
        block_rows: rows read at a time.
        pool_blocks: blocks that are mixed.
    """

    def __init__(
        self,
        store: TransitionStore,
        model: InverseDynamics,
        share: Share,
        seed: int,
        device: torch.device,
        *,
        block_rows: int = STREAM_BLOCK_ROWS,
        pool_blocks: int = STREAM_POOL_BLOCKS,
    ):
        self.store, self.share, self.seed, self.device = store, share, seed, device
        self.encoder = copy.deepcopy(model).cpu()
        self.pool_blocks = pool_blocks
        self.blocks = [
            (part, first, min(first + block_rows, part.rows))
            for part in store.parts("train")
            for first in range(0, part.rows, block_rows)
        ]
        self.steps_per_epoch = count_steps(store.num_rows("train"), share.batch_size)

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """Yield the epoch's chunks; see `Batches`."""
        generator = epoch_generator(self.seed, epoch)
        order = torch.randperm(len(self.blocks), generator=generator).tolist()
        pools = [order[i : i + self.pool_blocks] for i in range(0, len(order), self.pool_blocks)]
        chunk_rows = self.share.chunk_rows
        rest: Rows | None = None
        with ThreadPoolExecutor(max_workers=1) as reader:
            pending = reader.submit(self._read_pool, pools[0])
            for following in [*pools[1:], None]:
                roomy = pending.result()
                if following is not None:
                    pending = reader.submit(self._read_pool, following)
                rows = _put_before(roomy, rest, chunk_rows)
                order_in_pool = torch.randperm(len(rows[0]), generator=generator)
                step_rows = chunk_rows if following is not None else self.share.batch_size
                whole = len(order_in_pool) // step_rows * step_rows
                for index in order_in_pool[:whole].split(chunk_rows):
                    yield self._to_device(rows, index)
                left = order_in_pool[whole:]
                rest = (rows[0][left], rows[1][left])

    def _read_pool(self, pool: list[int]) -> Rows:
        """Return the encoded rows of some blocks, behind room for a chunk of rows that are left from the last pool."""
        blocks: list[tuple[Part, int, int]] = [self.blocks[i] for i in pool]
        total = self.share.chunk_rows + sum(stop - first for _, first, stop in blocks)
        context, target = torch.empty(total, self.encoder.context_dim), torch.empty(total, self.encoder.target_dim)
        at = self.share.chunk_rows
        for part, first, stop in blocks:
            mine = slice(at, at + stop - first)
            encode_into(self.encoder, self.store.read_rows(part, first, stop), context[mine], target[mine])
            at = mine.stop
        return context, target

    def _to_device(self, rows: Rows, index: Tensor) -> Rows:
        mine = self.share.of(index)
        flat = mine.reshape(-1)
        context, target = (values[flat].to(self.device, non_blocking=True) for values in rows)
        return context.unflatten(0, mine.shape), target.unflatten(0, mine.shape)


def _put_before(roomy: Rows, rest: Rows | None, room: int) -> Rows:
    """Put the rows that are left into the room at the front, and return all rows."""
    first = room - (0 if rest is None else len(rest[0]))
    for values, left in zip(roomy, rest or (), strict=False):
        values[first:room] = left
    return roomy[0][first:], roomy[1][first:]


def encode_rows(model: InverseDynamics, rows: dict[str, np.ndarray], device: torch.device) -> Rows:
    """Encode physical rows; see `encode_into`.

    Args:
        model: whose `encode` to use; it must be on `device`.
        rows: columns state, action and next_state.
        device: where the result lives.

    Returns:
        (context, target), float32.
    """
    total = len(rows["state"])
    context = torch.empty(total, model.context_dim, device=device)
    target = torch.empty(total, model.target_dim, device=device)
    encode_into(model, rows, context, target)
    return context, target


@torch.no_grad()
def encode_into(model: InverseDynamics, rows: dict[str, np.ndarray], context: Tensor, target: Tensor) -> None:
    """Encode physical rows into (rows, context_dim) and (rows, target_dim), in blocks: intermediates stay small."""
    size = ENCODE_ROWS_ON_CPU if context.device.type == "cpu" else ENCODE_ROWS
    for first in range(0, len(context), size):
        block = slice(first, first + size)
        columns = (torch.from_numpy(rows[n][block]).to(context.device) for n in ("state", "action", "next_state"))
        context[block], target[block] = model.encode(*columns)


def load_rows(model: InverseDynamics, store: TransitionStore, split: str, device: torch.device) -> Rows:
    """Read a split and encode it on `device`."""
    return encode_rows(model, store.load(split, columns=("state", "action", "next_state")), device)


def fits_in_memory(model: InverseDynamics, rows: int, device: torch.device, processes: int = 1) -> bool:
    """Return whether the encoded rows take at most half of the free memory of the device.

    Args:
        model: decides the size of a row.
        rows: of the split.
        device: where they would live.
        processes: on this machine, each with its own copy; every one has a GPU of its own.
    """
    needed = rows * (model.context_dim + model.target_dim) * 4
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory() // processes
    return bool(needed <= RESIDENT_MEMORY_SHARE * free)


def available_memory() -> int:
    """Return the bytes that new work on this machine may take, page cache that can be dropped included."""
    # SC_AVPHYS_PAGES counts no page cache: after reading a large dataset it is near zero.
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _read_text(MEMINFO), re.MULTILINE)
    machine = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    container = _read_text(CGROUP_LIMIT).strip()
    return min(machine, int(container)) if container.isdigit() else machine


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # not Linux, or no limit
        return ""


def count_steps(rows: int, batch_size: int) -> int:
    """Return the whole batches in `rows`.

    Raises:
        DataError: when there is not even one.
    """
    if rows < batch_size:
        raise DataError(
            f"the train split must hold at least one batch: it has {rows} rows, batch_size is {batch_size}; "
            "lower batch_size or extract more transitions"
        )
    return rows // batch_size


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """Return the order of resident rows in an epoch, on the CPU: the same on any device."""
    return torch.randperm(rows, generator=epoch_generator(seed, epoch))


def epoch_generator(seed: int, epoch: int, stream: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the source of randomness of one epoch: a resumed run draws what an uninterrupted one draws.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        stream: separates independent uses within an epoch.
        device: where it draws.
    """
    words = np.random.SeedSequence([seed, epoch, stream]).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 ^ int(words[1]))
