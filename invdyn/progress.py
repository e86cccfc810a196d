"""A progress line on standard error, for long commands."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Self, TextIO

TERMINAL_INTERVAL_S = 0.1
LOG_INTERVAL_S = 10.0
BAR_WIDTH = 24


class Progress:
    """Show how far a job is: one line redrawn in place on a terminal, one line now and then otherwise.

    Attributes:
        total: units of work in all.
        done: units finished so far, those finished by an earlier run included.

    Example:
        >>> with Progress(2, "collect", "episodes", stream=sys.stdout) as progress:
        ...     progress.update(2, "no detail")  # doctest: +ELLIPSIS
        collect: 2/2 episodes (100%), ... no detail
    """

    def __init__(self, total: int, description: str, unit: str, *, done: int = 0, stream: TextIO | None = None) -> None:
        """Prepare a line for `total` units, `done` of which need no more work."""
        self.total, self.done = total, done
        self._description, self._unit = description, unit
        self._skipped = done
        self._detail = ""
        self._stream = stream if stream is not None else sys.stderr
        self._redraw = self._stream.isatty()
        self._start_s = self._shown_s = time.monotonic()
        self._shown_done = -1

    def __enter__(self) -> Self:
        """Start the clock."""
        self._start_s = self._shown_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last state, and leave the cursor on a new line."""
        if self._shown_done != self.done:
            self._show()
        if self._redraw:
            self._write("\n")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s

    def update(self, count: int = 1, detail: str = "") -> None:
        """Count finished units; `detail` (for example a rate) ends the line."""
        self.done += count
        self._detail = detail
        interval_s = TERMINAL_INTERVAL_S if self._redraw else LOG_INTERVAL_S
        if self.done >= self.total or time.monotonic() - self._shown_s >= interval_s:
            self._show()

    def say(self, line: str) -> None:
        """Show a line that stays, above the progress."""
        self._write(("\r\033[K" if self._redraw else "") + line + "\n")

    def _show(self) -> None:
        self._shown_s, self._shown_done = time.monotonic(), self.done
        if self._redraw:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r" + self._line(bar=True)[:width].ljust(width))
        else:
            self._write(self._line(bar=False) + "\n")

    def _line(self, bar: bool) -> str:
        share = self.done / self.total if self.total else 1.0
        filled = min(int(share * BAR_WIDTH), BAR_WIDTH)
        picture = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] " if bar else ""
        parts = [f"{picture}{self.done}/{self.total} {self._unit} ({share:.0%})", self._time_left(), self._detail]
        return f"{self._description}: " + ", ".join(part for part in parts if part)

    def _time_left(self) -> str:
        elapsed_s, fresh = self.elapsed_s, self.done - self._skipped
        if self.done >= self.total:
            return f"{format_duration(elapsed_s)}"
        return f"{format_duration(elapsed_s * (self.total - self.done) / fresh)} left" if fresh > 0 else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def format_duration(seconds: float) -> str:
    """Return a duration in the two units that matter.

    Example:
        >>> format_duration(4.21), format_duration(75), format_duration(7260)
        ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    return f"{minutes // 60} h {minutes % 60} min"
