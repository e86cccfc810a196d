"""Quiet, offline, single-threaded processes; one Ray instance for the session; shapes checked at run time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# Before anything imports ray, wandb or torch: they read these once. Forced, so that no test can reach an account.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DEDUP_LOGS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MPLBACKEND": "Agg",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
)
os.environ.pop("RAY_ADDRESS", None)

import jaxtyping
import pytest
from hypothesis import settings

# Parts whose array shapes are annotated: in the tests every call checks them. Must come before they are imported.
jaxtyping.install_import_hook(["invdyn.statistics", "invdyn.models"], "beartype.beartype")

# A shell that starts the tests in the background ignores Ctrl-C, and so would every command that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

RAY_STARTS = 3

# A shared machine is slow at times, which is not a failure; the same examples on every run.
settings.register_profile("invdyn", deadline=None, derandomize=True)
settings.load_profile("invdyn")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the working directory: relative outputs land here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def _single_threaded_torch() -> None:
    """Keep torch, where a test module has imported it, from fighting itself over shared cores."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """Check no shapes in this test: that breaks graphs, cannot be exported, and knows no batched tensors.

    Graphs that torch has made meanwhile are dropped for the tests after it.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    if torch := sys.modules.get("torch"):
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray instance of this process for all tests; never a cluster that happens to run on this machine.

    Eight logical CPUs on any machine, so that nested workers never wait for one another. The dashboard stays on:
    stopping a trial that has workers of its own needs it.
    """
    import ray

    for attempt in range(RAY_STARTS):
        try:
            ray.init(address="local", num_cpus=8, log_to_driver=False, logging_level="ERROR")
            break
        except Exception as error:  # Ray's own kind for this is Exception
            # It gives its processes 30 s, whatever the machine does meanwhile.
            if "timed out during startup" not in str(error) or attempt + 1 == RAY_STARTS:
                raise
            ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bucket of a real S3 server, a process on this machine; the environment says how to reach it."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    log = (tmp_path_factory.mktemp("s3") / "server.log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(endpoint).close()
                break
            except OSError:
                time.sleep(0.1)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            yield "s3://bucket"
    finally:
        server.terminate()
        server.wait()
        log.close()


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty folder: in the memory of this process, or on the S3 server."""
    if request.param == "s3":
        yield f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
        return
    from fsspec.implementations.memory import MemoryFileSystem

    yield f"memory://{tmp_path.name}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
