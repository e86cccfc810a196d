"""A run that grows when a node joins and goes on with fewer workers when one leaves: real nodes of one machine."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from invdyn.training import distributed
from invdyn.training.checkpoint import list_checkpoints
from invdyn.training.distributed import train
from invdyn.transitions.store import TransitionStore
from tests.training.runs import make_dataset, read_metrics_csv, run_config
from tests.training.waiting import wait_for

EPOCHS, STEPS_PER_EPOCH = 400, 98


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TransitionStore:
    return make_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of one node with room for one worker."""
    import ray
    from ray.cluster_utils import Cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_port": port})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.cluster
def test_a_node_joins_and_leaves(
    store: TransitionStore, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "RESIZE_INTERVAL_S", 2.0)
    values: dict[str, Any] = {"num_epochs": EPOCHS, "checkpoints": 40, "batch_size": 17}  # two do not divide it
    config = run_config(store, tmp_path / "run", num_workers=2, min_workers=1, **values)
    log = tmp_path / "run/train.log"
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(train, config)

        def until(condition: Callable[[], Any]) -> Any:
            return wait_for(lambda: condition() or job.done())

        until(lambda: list_checkpoints(tmp_path / "run"))
        node = cluster.add_node(num_cpus=1)  # from this thread alone
        until(lambda: "2 worker(s) on cpu, continuing" in log.read_text())
        found = list_checkpoints(tmp_path / "run")
        until(lambda: list_checkpoints(tmp_path / "run")[-1] != found[-1])
        cluster.remove_node(node, allow_graceful=False)
        metrics = job.result()
    assert metrics["epoch"] == EPOCHS
    said = [line for line in log.read_text().splitlines() if " go on from step " in line or "restarted" in line]
    assert len(said) == 2, said
    assert re.fullmatch(
        r"nodes joined or left( after step .*)?: 2 worker\(s\) in place of 1 go on from step .*", said[0]
    )
    assert re.fullmatch(
        r"worker \d lost on node \S+( after step .*)?: restarted on 1 worker\(s\) from step .*", said[1]
    )
    rows = read_metrics_csv(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [10 * done * STEPS_PER_EPOCH for done in range(1, 41)]
    assert metrics["val_nrmse"] < 0.01
