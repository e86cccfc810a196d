"""What Ray Train tells of workers that fail, in the words of a run's log, and when a run is given up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from invdyn import storage
from invdyn.errors import InvdynError
from invdyn.training.attempt import Mark, note_fault, read_mark
from invdyn.training.checkpoint import list_checkpoints
from invdyn.url_path import as_path

SILENT = "WorkerHealthCheckTimeoutError"
"""Ray's own error of a worker that does not answer; it is not among those that Ray offers to others."""
MAX_FAILURES = 3
"""Attempts that may be lost one after another without a new checkpoint."""


class WorkersLost(InvdynError):
    """Workers of a run are lost again and again."""

    exit_code = 1


class FaultNotes:
    """Notes for the next attempt at a run why one has ended; gives the run up when none gets any further.

    Args:
        run_dir: of the run.
        environment: endpoints and credentials of its storage.
    """

    def __init__(self, run_dir: str, environment: Mapping[str, str]):
        self.run_dir, self.environment = run_dir, environment
        self.token, self.newest = "", ""
        self.failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:  # noqa: ARG002
        """Note the failures of an attempt; Ray calls it, perhaps more than once for each.

        Raises:
            WorkersLost: after MAX_FAILURES restarts without a new checkpoint.
        """
        storage.set_environment(self.environment)
        folder = as_path(self.run_dir)
        mark = read_mark(folder) or Mark()  # lost before it began, or behind a cut where it came to the end
        if mark.fault is not None and mark.token == self.token:
            return
        self.token = mark.token
        note_fault(folder, describe_failures(worker_exceptions, mark.hosts))
        found = list_checkpoints(folder)
        newest = found[-1].name if found else ""
        self.failures = self.failures + 1 if newest == self.newest else 1
        self.newest = newest
        if self.failures > MAX_FAILURES:
            fault = (read_mark(folder) or mark).fault
            raise WorkersLost(
                f"given up after {MAX_FAILURES} restarts without a new checkpoint: {fault}; its log says why "
                f"(docs/cluster.md), then continue with --resume {self.run_dir}"
            )


def describe_failures(failures: Mapping[int, Exception], hosts: Sequence[str]) -> str:
    """Return in words why an attempt has ended.

    Args:
        failures: rank to what Ray says of it.
        hosts: nodes by rank; empty when they are not known.
    """
    # Of workers that are gone Ray tells by an error of its own; what the others raise then only follows from it.
    if lost := [rank for rank, error in sorted(failures.items()) if hasattr(error, "health_check_failure")]:
        return f"worker {_join(lost)} lost{_where(lost, hosts)}"
    if silent := [rank for rank, error in sorted(failures.items()) if type(error).__name__ == SILENT]:
        return f"worker {_join(silent)} gave no answer any more{_where(silent, hosts)}"
    rank, error = min(failures.items())
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"worker {rank} failed{_where([rank], hosts)}: {what}"


def _where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return f" on node {_join(hosts[rank] for rank in ranks)}" if hosts else ""


def _join(words: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, words)))
