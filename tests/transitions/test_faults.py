"""Processes and machines that die in the middle of an extraction: the dataset is the same to the byte."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import Listener, create_dataset
from tests.sequences.recordings import write_recording
from tests.transitions.datasets import config_of, contents

NUM_PARTS = 12
HALF_WRITTEN = re.compile(r"\.part-\d{5}\.h5\.(\d+)\.[0-9a-f]{8}\.tmp")


@pytest.fixture
def config(tmp_path: Path) -> DatasetConfig:
    """A recording of a few parts that each take a moment to write."""
    random = np.random.default_rng(0)
    episodes = [(random.normal(size=(501, 100)), random.normal(size=(500, 20))) for _ in range(4 * NUM_PARTS)]
    write_recording(tmp_path / "sequence/r", episodes)
    return config_of(tmp_path, part_size_mb=1.9)


@pytest.fixture
def whole(tmp_path: Path, config: DatasetConfig) -> dict[str, bytes]:
    """The files of a run that nothing happens to."""
    store = create_dataset(config.replace(output_path=str(tmp_path / "whole")), local=True)
    assert len(store.manifest["sources"]) == NUM_PARTS
    return contents(store.path)


def kill_a_writer(folder: Path, killed: list[int], stop: threading.Event) -> None:
    """Kill a process that is in the middle of writing a part: its name for that holds its process number."""
    while not stop.is_set() and not killed:
        for path in folder.glob("*/.part-*"):
            if found := HALF_WRITTEN.fullmatch(path.name):
                os.kill(int(found[1]), signal.SIGKILL)
                killed.append(int(found[1]))
                return
        time.sleep(0.0005)


def test_killed_worker(config: DatasetConfig, whole: dict[str, bytes], ray_session: None) -> None:
    output = Path(config.transitions_path)
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_a_writer, args=(output, killed, stop))
    killer.start()
    try:
        create_dataset(config, num_workers=3)
    finally:
        stop.set()
        killer.join()
    assert killed, "no worker was seen writing"
    assert contents(output) == whole


def test_killed_driver(config: DatasetConfig, whole: dict[str, bytes], repository: Path, ray_session: None) -> None:
    import ray

    output = Path(config.transitions_path)
    path = output.parents[1] / "dataset.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    script = str(repository / "experiments/create_dataset.py")
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, script, "--config", str(path), "--address", address, "--num_workers", "1"],
        env={**os.environ, "PYTHONPATH": str(repository), "RAY_AUTH_MODE": "token"},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while len(list(output.glob("train/part-*.h5"))) < 2 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, driver.stderr and driver.stderr.read().decode()
    assert not (output / "manifest.json").exists()
    done: list[int] = []
    said: list[str] = []
    create_dataset(config, num_workers=3, listener=Listener(on_rows=done.append, on_fault=said.append))
    assert done[0] > 0
    (line,) = said
    assert re.fullmatch(rf"an earlier run was cut off: [1-9]\d* of {NUM_PARTS} parts are kept", line)
    assert contents(output) == whole


@pytest.fixture
def lose_second_node() -> Iterator[Callable[[], None]]:
    """A cluster of two nodes, each with room for one task, the driver on the first; call it to lose the second."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield lambda: cluster.remove_node(node, allow_graceful=False)
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.cluster
def test_lost_node(config: DatasetConfig, whole: dict[str, bytes], lose_second_node: Callable[[], None]) -> None:
    import ray

    calls = iter(range(1000))

    def lose_node(rows: int) -> None:
        if next(calls) == 2:
            lose_second_node()

    assert ray.cluster_resources()["CPU"] == 2
    create_dataset(config, listener=Listener(on_rows=lose_node))
    assert next(calls) > NUM_PARTS // 2
    assert [node["Alive"] for node in ray.nodes()].count(True) == 1
    assert contents(Path(config.transitions_path)) == whole
