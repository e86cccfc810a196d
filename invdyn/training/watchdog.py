"""A time limit for training that hangs: the process is ended, so that Ray restarts it from the latest checkpoint."""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from types import TracebackType
from typing import Self

from invdyn.training.attempt import Attempt, note_fault

EXIT_HUNG = 70
NOTE_S = 5.0
"""How long noting the reason may take: the folder may be what hangs."""


class Watchdog:
    """Ends this process, while it is entered, when no step is taken for too long.

    Where the threads are goes to standard error, which Ray keeps in the worker's log.

    Args:
        limit_s: seconds; 0 for no limit.
        attempt: whose end is noted.
    """

    def __init__(self, limit_s: float, attempt: Attempt):
        self.limit_s, self.attempt = limit_s, attempt
        self.step = 0
        self.beaten = time.monotonic()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.beaten = time.monotonic()
        if self.limit_s:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()

    def beat(self, step: int) -> None:
        """Tell that a step has been taken."""
        self.step, self.beaten = step, time.monotonic()

    def _watch(self) -> None:
        while not self.stopped.wait(min(self.limit_s / 4, 1.0)):
            if time.monotonic() - self.beaten > self.limit_s:
                fault = f"no step within {self.limit_s:g} s after step {self.step:,} on node {socket.gethostname()}"
                note = threading.Thread(
                    target=note_fault, args=(self.attempt.folder, fault, self.attempt.mark.token), daemon=True
                )
                note.start()
                note.join(NOTE_S)
                faulthandler.dump_traceback()
                os._exit(EXIT_HUNG)
