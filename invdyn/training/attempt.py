"""Attempts at a run: only the newest may write into its folder, and it says what ended the one before.

A file in the run's folder names the attempt that may write. One that was taken for lost (its node was cut off, say, and
lives on) finds another name there, or that it was given up, and stops. The file goes when a run ends by itself.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from invdyn.errors import InvdynError
from invdyn.training.worker import Worker, stopping_together
from invdyn.url_path import AnyPath, as_path, write_whole

WRITER_FILE = ".writer"


class Superseded(InvdynError):
    """Another attempt at the same run writes into its folder now."""

    exit_code = 1


@dataclass(frozen=True)
class Mark:
    """What the file holds.

    Attributes:
        token: of the attempt that may write.
        job: of the command that it belongs to; restarts within one command share it.
        hosts: names of the nodes of its workers, by rank.
        fault: what ended it, in words, when that is known; then nobody may write.
    """

    token: str = ""
    job: str = ""
    hosts: tuple[str, ...] = ()
    fault: str | None = None


@dataclass(frozen=True)
class Attempt:
    """This process's part in an attempt at a run.

    Attributes:
        folder: of the run.
        mark: this attempt's.
        before: mark of an attempt that did not end by itself, if there was one.
        owner: whether this process writes for the others.
    """

    folder: AnyPath
    mark: Mark
    before: Mark | None = None
    owner: bool = True

    @classmethod
    def claim(cls, folder: AnyPath, worker: Worker) -> Attempt:
        """Become the only attempt that may write."""
        mark = Mark(uuid.uuid4().hex, worker.job, worker.hosts or (socket.gethostname(),) * worker.world_size)
        before = read_mark(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_mark(folder, mark)
        return cls(folder, mark, before)

    @classmethod
    def join(cls, folder: AnyPath) -> Attempt:
        """Take part in the attempt of the worker that has claimed the folder."""
        return cls(folder, read_mark(folder) or Mark(), owner=False)

    def holds(self) -> bool:
        """Return whether this attempt may still write."""
        return read_mark(self.folder) == self.mark

    def check(self) -> None:
        """Check that this attempt may still write.

        Raises:
            Superseded: when it may not.
        """
        if not self.holds():
            raise Superseded(
                f"only the newest attempt at a run may write into {self.folder}: this one was taken for lost, or the "
                "run was continued elsewhere; it stops"
            )

    def release(self) -> None:
        """Note that the run has ended by itself."""
        if self.owner and self.holds():
            (self.folder / WRITER_FILE).unlink(missing_ok=True)

    def story(self, reached: int, step: int) -> str | None:
        """Return in one line what ended the attempt before and what is done now; None where there was none.

        Args:
            reached: last step that it has recorded.
            step: where this attempt goes on.
        """
        if self.before is None:
            return None
        old, new = len(self.before.hosts), len(self.mark.hosts)
        after = f" after step {reached:,}" if reached > step else ""
        where = f"from step {step:,}" if step else "from the start"
        if self.before.fault:
            after = "" if "after step" in self.before.fault else after
            return f"{self.before.fault}{after}: restarted on {new} worker(s) {where}"
        if self.before.job != self.mark.job or not self.mark.job:
            return f"command was cut off{after}: continued on {new} worker(s) {where}"
        if old != new:
            return f"nodes joined or left{after}: {new} worker(s) in place of {old} go on {where}"
        return f"worker lost on node {self.before.hosts[0]}{after}: restarted on node {self.mark.hosts[0]} {where}"


@contextmanager
def attempting(run_dir: str, worker: Worker) -> Iterator[Attempt]:
    """Make the workers an attempt at a run; it ends by itself when the block ends, or with an error that users mend.

    All workers must enter.
    """
    folder = as_path(run_dir)
    with stopping_together(worker):
        claimed = Attempt.claim(folder, worker) if worker.rank == 0 else None
    with stopping_together(worker):
        attempt = claimed or Attempt.join(folder)
    try:
        yield attempt
    except InvdynError:
        attempt.release()
        raise
    attempt.release()


def note_fault(folder: AnyPath, fault: str, token: str | None = None) -> None:
    """Note what ended an attempt, unless that is known: it may not write any more, and the next one tells.

    Args:
        folder: of the run.
        fault: what ended it, in words.
        token: of the attempt, if it has to be this one.
    """
    mark = read_mark(folder) or Mark()
    if mark.fault is None and token in (None, mark.token):
        _write_mark(folder, replace(mark, fault=fault))


def read_mark(folder: AnyPath) -> Mark | None:
    """Return who may write into a run's folder; None where no attempt goes on."""
    path = folder / WRITER_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return Mark(**{**values, "hosts": tuple(values["hosts"])})


def _write_mark(folder: AnyPath, mark: Mark) -> None:
    write_whole(folder / WRITER_FILE, json.dumps(asdict(mark)))
