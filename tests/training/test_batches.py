from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from invdyn.errors import ConfigError, DataError
from invdyn.models.base import InverseDynamics
from invdyn.models.registry import build_model
from invdyn.training import batches
from invdyn.training.batches import (
    Batches,
    ResidentBatches,
    Share,
    StreamingBatches,
    available_memory,
    count_steps,
    epoch_generator,
    fits_in_memory,
    load_rows,
)
from invdyn.transitions.store import TransitionStore
from tests.training.runs import run_config

CPU = torch.device("cpu")
BATCH = 32


@pytest.fixture(scope="module")
def model(store: TransitionStore) -> InverseDynamics:
    config = run_config(store, Path("unused"))
    model = build_model(config.model, config.state_dim, config.action_dim)
    model.fit_normalization(store.moments)
    return model


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks per epoch, the last one shorter."""
    monkeypatch.setattr(batches, "STEPS_PER_CHUNK", 5)


def numbered(rows: int, share: Share, seed: int = 0) -> ResidentBatches:
    number = torch.arange(rows, dtype=torch.float32)[:, None]
    return ResidentBatches((number, number + 0.5), share, seed)


def streamed(store: TransitionStore, model: InverseDynamics, share: Share, seed: int = 0) -> StreamingBatches:
    return StreamingBatches(store, model, share, seed, CPU, block_rows=50, pool_blocks=3)


def make(kind: str, store: TransitionStore, model: InverseDynamics, share: Share, seed: int = 0) -> Batches:
    if kind == "streamed":
        return streamed(store, model, share, seed)
    return ResidentBatches(load_rows(model, store, "train", CPU), share, seed)


def rows_of_epoch(batches: Batches, epoch: int = 0) -> torch.Tensor:
    """(steps, local batch, context + target columns)."""
    return torch.cat([torch.cat(chunk, dim=2) for chunk in batches.epoch(epoch)])


def as_set(rows: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in rows.reshape(-1, rows.shape[-1])}


def test_resident_rows_at_most_once_and_together() -> None:
    found = numbered(1000, Share(BATCH))
    rows = rows_of_epoch(found)
    assert found.steps_per_epoch == 31
    assert rows.shape == (31, BATCH, 2)
    assert len(rows[..., 0].unique()) == 31 * BATCH
    assert torch.equal(rows[..., 1], rows[..., 0] + 0.5)


def test_a_full_epoch_visits_every_row() -> None:
    assert len(rows_of_epoch(numbered(10 * BATCH, Share(BATCH)))[..., 0].unique()) == 10 * BATCH


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_streaming_visits_the_rows_of_the_split_at_most_once(
    store: TransitionStore, model: InverseDynamics, epoch: int
) -> None:
    found = streamed(store, model, Share(BATCH))
    assert len({part for part, _, _ in found.blocks}) > 1
    rows = rows_of_epoch(found, epoch)
    context, target = load_rows(model, store, "train", CPU)
    everything = as_set(torch.cat([context, target], dim=1))
    total = store.num_rows("train")
    assert total % BATCH != 0  # so that some rows are left over
    assert len(rows) == found.steps_per_epoch == total // BATCH
    assert len(as_set(rows)) == len(rows) * BATCH
    assert as_set(rows) <= everything
    assert len(everything - as_set(rows)) == total % BATCH


def test_streaming_mixes_rows_of_several_blocks(store: TransitionStore, model: InverseDynamics) -> None:
    context, target = load_rows(model, store, "train", CPU)
    place = {row.numpy().tobytes(): number for number, row in enumerate(torch.cat([context, target], dim=1))}
    rows = rows_of_epoch(streamed(store, model, Share(BATCH)))
    for batch in rows[:3]:
        assert len({place[row.numpy().tobytes()] // 50 for row in batch}) >= 3


@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_split_the_same_global_batches(
    store: TransitionStore, model: InverseDynamics, kind: str, world_size: int
) -> None:
    whole = rows_of_epoch(make(kind, store, model, Share(BATCH)), epoch=3)
    ranks = [rows_of_epoch(make(kind, store, model, Share(BATCH, r, world_size)), epoch=3) for r in range(world_size)]
    counts = [rows.shape[1] for rows in ranks]
    assert max(counts) - min(counts) <= (BATCH % world_size > 0)
    weights = [Share(BATCH, rank, world_size).loss_weight for rank in range(world_size)]
    assert weights == [pytest.approx(count * world_size / BATCH) for count in counts]
    assert torch.equal(torch.cat(ranks, dim=1), whole)
    assert sum(len(as_set(rows)) for rows in ranks) == len(as_set(whole))


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_order_depends_on_seed_and_epoch_alone(store: TransitionStore, model: InverseDynamics, kind: str) -> None:
    first = rows_of_epoch(make(kind, store, model, Share(BATCH), seed=1), epoch=2)
    again = make(kind, store, model, Share(BATCH), seed=1)
    list(again.epoch(0))
    torch.manual_seed(99)
    assert torch.equal(rows_of_epoch(again, epoch=2), first)
    assert not torch.equal(rows_of_epoch(again, epoch=3), first)
    assert not torch.equal(rows_of_epoch(make(kind, store, model, Share(BATCH), seed=2), epoch=2), first)


def test_share_of_noise_is_the_share_of_the_global_draw() -> None:
    noise = torch.arange(24.0).reshape(12, 2)
    shares = [Share(4, rank, 2).of(noise) for rank in range(2)]
    assert [share.shape for share in shares] == [(3, 2, 2)] * 2
    assert torch.equal(torch.cat(shares, dim=1).reshape(12, 2), noise)


def test_batch_must_hold_a_row_for_each_worker() -> None:
    with pytest.raises(ConfigError, match="must hold a row for each worker: got 2 for 3 workers"):
        Share(2, 0, 3)


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_too_few_rows_for_one_batch(store: TransitionStore, model: InverseDynamics, kind: str) -> None:
    rows = store.num_rows("train")
    with pytest.raises(DataError, match=rf"at least one batch: it has {rows} rows, batch_size is {rows + 1}"):
        make(kind, store, model, Share(rows + 1))
    assert count_steps(rows, rows) == 1


def test_a_part_lost_while_streaming_is_a_data_error(
    store: TransitionStore, model: InverseDynamics, tmp_path: Path
) -> None:
    copy = TransitionStore(shutil.copytree(store.path, tmp_path / "copy"))
    found = streamed(copy, model, Share(BATCH))
    Path(copy.path, copy.parts("train")[-1].file).unlink()
    with pytest.raises(DataError, match="part cannot be read"):
        rows_of_epoch(found)


def test_generators_of_streams_epochs_and_seeds_differ() -> None:
    keys = [(seed, epoch, stream) for seed in (0, 1) for epoch in (0, 1) for stream in (0, 1, 2)]
    draws = {tuple(torch.rand(2, generator=epoch_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_fits_in_memory(model: InverseDynamics, monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = (model.context_dim + model.target_dim) * 4
    monkeypatch.setattr(batches, "available_memory", lambda: 2 * 100 * row_bytes)
    assert fits_in_memory(model, 100, CPU)
    assert not fits_in_memory(model, 101, CPU)
    assert fits_in_memory(model, 50, CPU, processes=2)
    assert not fits_in_memory(model, 51, CPU, processes=2)


def test_available_memory_counts_page_cache_and_obeys_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree:  10 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "limit").write_text("max\n")
    monkeypatch.setattr(batches, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(batches, "CGROUP_LIMIT", tmp_path / "limit")
    assert available_memory() == 8000 * 1024
    (tmp_path / "limit").write_text("4096000\n")
    assert available_memory() == 4096000
    monkeypatch.setattr(batches, "MEMINFO", tmp_path / "absent")
    monkeypatch.setattr(batches, "CGROUP_LIMIT", tmp_path / "absent")
    assert available_memory() > 2**28
