"""What every node of a cluster must reach before a job starts there, and where it does not."""

from __future__ import annotations

import hashlib
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invdyn import storage
from invdyn.errors import ConfigError, InvdynError, StorageError
from invdyn.url_path import as_path, write_whole

MARK_FILE = ".reached_by_all_nodes.tmp"
ANSWER_S = 120.0
"""How long a node may take to answer: it may have to start a process for it."""
WATCH_INTERVAL_S = 1.0
HEAD_BYTES = 65_536
SHOWN_NODES = 5
ADVICE = "use a folder that all nodes share, or an s3:// or gs:// URL (docs/storage.md)"

Fingerprint = tuple[int, str]


@dataclass(frozen=True)
class SharedFiles:
    """Files of a job as its driver sees them; pickled to workers, which say where they see something else.

    Attributes:
        folder: where the job writes.
        token: content of the mark that the driver has left there.
        reads: files that the job reads, to what they are on the driver.
        environment: endpoints and credentials of the driver.
    """

    folder: str
    token: str
    reads: Mapping[str, Fingerprint]
    environment: Mapping[str, str] = field(repr=False)

    def problem(self) -> str | None:
        """Return what this process does not see as the driver does, or None."""
        storage.set_environment(self.environment)
        try:
            if _read_mark(self.folder) != self.token:
                return f"{self.folder} is not the driver's folder"
            for path, expected in self.reads.items():
                found = fingerprint(path)
                if found is None:
                    return f"{path} is not there"
                if found != expected:
                    return f"{path} is another file than the driver's"
        except (InvdynError, OSError) as error:
            return " ".join(str(error).split())
        return None

    def problem_here(self) -> str | None:
        """Return an error's text that names this node, or None; a node that joined late has not been asked before."""
        problem = self.problem()
        where = socket.gethostname()
        return problem and f"every node must reach the job's files; on node {where}: {problem}; {ADVICE}"

    def check_here(self) -> None:
        """Check that this process reaches the job's files.

        Raises:
            StorageError: naming the node and what it does not reach.
        """
        if text := self.problem_here():
            raise StorageError(text)


@contextmanager
def shared_files(folder: str, reads: Sequence[str], needs: Mapping[str, float]) -> Iterator[SharedFiles]:
    """Check that all nodes that can run a job's workers reach its files, as long as it runs.

    The driver leaves a mark in `folder`. A task on every other node compares it, and the files that the job reads, with
    what the driver sees, and writes a file beside it.

    Args:
        folder: where the job writes.
        reads: files that it reads.
        needs: resources of a worker; nodes without them are not asked.

    Raises:
        ConfigError: naming every node that does not reach them, and what it does not see.
        StorageError: when the driver itself cannot write.
    """
    for path in (folder, *reads):
        storage.check_shared("what workers read and write", path)
    there = as_path(folder)
    new = isinstance(there, Path) and not there.exists()
    files = SharedFiles(
        folder,
        uuid.uuid4().hex,
        {path: found for path in reads if (found := fingerprint(path)) is not None},
        storage.environment(),
    )
    try:
        _leave_mark(files)
        _check_nodes(files, needs)
        yield files
    finally:
        with suppress(OSError, StorageError):
            (there / MARK_FILE).unlink(missing_ok=True)
        if new:
            with suppress(OSError):  # that it is not empty: the job has begun
                storage.remove_empty_folder(folder)


@contextmanager
def watching_nodes(tell: Callable[[str], None], consequence: str) -> Iterator[None]:
    """Tell of every node that leaves the cluster, or joins it, while a job runs.

    Args:
        tell: called with one line for each, from another thread.
        consequence: what becomes of the work of a node that has left.
    """
    stopped = threading.Event()
    known = _live_nodes()

    def watch() -> None:
        nonlocal known
        while not stopped.wait(WATCH_INTERVAL_S):
            now = _live_nodes()
            for node in known.keys() - now.keys():
                tell(f"node {known[node]} lost: {consequence}")
            for node in now.keys() - known.keys():
                tell(f"node {now[node]} joined: it takes its share of what is left")
            known = now

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _live_nodes() -> dict[str, str]:
    import ray

    return {node["NodeID"]: _name(node) for node in ray.nodes() if node["Alive"]}


def fingerprint(path: str) -> Fingerprint | None:
    """Return size and a hash of the first bytes of a file; None where there is none."""
    try:
        size = storage.status(path).size
        return size, hashlib.blake2b(storage.read_head(path, HEAD_BYTES), digest_size=8).hexdigest()
    except FileNotFoundError:
        return None


def _leave_mark(files: SharedFiles) -> None:
    folder = as_path(files.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / MARK_FILE, files.token)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}; check it, or give another") from None


def _read_mark(folder: str) -> str | None:
    try:
        return storage.read_text(storage.join(folder, MARK_FILE))
    except FileNotFoundError:
        return None


def _answer(files: SharedFiles, node: str) -> str | None:
    """Run on a node: return what it does not reach, or None; leave a file for the driver."""
    if problem := files.problem():
        return problem
    try:
        write_whole(as_path(files.folder) / _answer_name(node), files.token)
    except (InvdynError, OSError) as error:
        return f"{files.folder} cannot be written: {' '.join(str(error).split())}"
    return None


def _answer_name(node: str) -> str:
    return f".reached_by_{node}.tmp"


def _check_nodes(files: SharedFiles, needs: Mapping[str, float]) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = ray.get_runtime_context().get_node_id()
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != own
        and all(node["Resources"].get(name, 0) >= amount for name, amount in needs.items())
    ]
    task = ray.remote(num_cpus=0, max_retries=0)(_answer)
    asked = {
        node["NodeID"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(files, node["NodeID"])
        for node in nodes
    }
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
    problems = {_name(node): problem for node in nodes if (problem := _problem_of(files, node, asked[node["NodeID"]]))}
    if problems:
        shown = "; ".join(f"on node {name}: {problem}" for name, problem in list(problems.items())[:SHOWN_NODES])
        more = f" (and {len(problems) - SHOWN_NODES} more nodes)" if len(problems) > SHOWN_NODES else ""
        raise ConfigError(f"every node must reach the job's files; {shown}{more}; {ADVICE}")


def _problem_of(files: SharedFiles, node: Mapping[str, Any], reference: Any) -> str | None:
    import ray

    answer = as_path(files.folder) / _answer_name(node["NodeID"])
    try:
        if problem := ray.get(reference, timeout=0):
            return str(problem)
        if not answer.exists():
            return f"what it writes to {files.folder} does not arrive here"
        return None
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        return f"no answer within {ANSWER_S:.0f} s"
    except ray.exceptions.RayError as error:
        return f"it cannot be asked: {' '.join(str(error).split())[-300:]}"
    finally:
        with suppress(OSError):
            answer.unlink(missing_ok=True)


def _name(node: Mapping[str, Any]) -> str:
    """Return a node's name and address."""
    names = [node["NodeManagerHostname"], node.get("NodeName", ""), node["NodeManagerAddress"]]
    first, *others = dict.fromkeys(name for name in names if name)
    return f"{first} ({', '.join(others)})" if others else str(first)
