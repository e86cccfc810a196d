"""Metrics of a run: a local CSV always, W&B where wanted, and the console."""

from __future__ import annotations

import csv
import io
import math
import netrc
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from invdyn.errors import DataError
from invdyn.training.attempt import Attempt
from invdyn.training.run_config import RunConfig
from invdyn.url_path import AnyPath, GrowingText, UrlPath, as_path, upload_folder, write_whole

METRICS_CSV = "metrics.csv"
CONSOLE_LOG = "train.log"
WANDB_ID = "wandb_run_id.txt"
ONLINE_TIMEOUT_S = 30.0
UPLOAD_INTERVAL_S = 5.0
"""Between two uploads of a log that grows on a storage service."""
OFFLINE_HINT = "recording offline; send it later with `wandb login` and `wandb sync RUN_DIR/wandb/offline-run-*`"
WANDB_URL = "https://api.wandb.ai"

Mode = Literal["online", "offline", "disabled"]


class Tracker:
    """Writes rows of metrics. A resumed run continues its CSV after the checkpoint's step, and the same W&B run.

    Args:
        config: the run.
        resumed_step: step of the checkpoint that the run continues from; 0 for a new run.
        echo: print console lines too; where the trainer is another process, the command shows the log file instead.
        one_of_many: other runs are tracked in this process at the same time.
        attempt: at the run, which must be allowed to write; None for a run that takes no steps.
    """

    def __init__(
        self,
        config: RunConfig,
        resumed_step: int = 0,
        echo: bool = True,
        *,
        one_of_many: bool = False,
        attempt: Attempt | None = None,
    ):
        self.folder = as_path(config.run_dir)
        self.echo, self.one_of_many, self.attempt = echo, one_of_many, attempt
        self.columns: list[str] = []
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.console_file = GrowingText(self.folder / CONSOLE_LOG, _Every(UPLOAD_INTERVAL_S))
            rows = read_rows(self.folder / METRICS_CSV)
            self._start_csv([row for row in rows if int(row["step"]) <= resumed_step] if resumed_step else [])
            self.csv_file = GrowingText(self.folder / METRICS_CSV)
        if attempt and (story := attempt.story(int(rows[-1]["step"]) if rows else 0, resumed_step)):
            self.console(story)
        # W&B writes files of its own, which go to a storage service when it is done.
        self.scratch = tempfile.TemporaryDirectory(prefix="invdyn-wandb-") if isinstance(self.folder, UrlPath) else None
        self.wandb_run = self._start_wandb(config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record one row; every row of a run has the same columns."""
        row = {"step": step, **metrics}
        with self._writing():
            header = not self.columns
            self.columns = self.columns or list(row)
            self.csv_file.write(to_csv(self.columns, [row], header))
        if self.wandb_run is not None:
            self.wandb_run.log(metrics, step=step)

    def check(self) -> None:
        """Check that the run may still be written.

        Raises:
            Superseded: when it may not.
        """
        if self.attempt is not None:
            self.attempt.check()

    def summarize(self, values: dict[str, float]) -> None:
        """Put values into the W&B run's summary."""
        if self.wandb_run is not None:
            self.wandb_run.summary.update(values)

    def console(self, line: str) -> None:
        """Show one line to whoever watches the run."""
        with self._writing():
            self.console_file.write(line + "\n")
        if self.echo:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run and the files."""
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=exit_code)
        if self.attempt is not None and not self.attempt.holds():
            return  # nor what is left of its lines
        if self.scratch is not None:
            upload_folder(Path(self.scratch.name), self.folder)
            self.scratch.cleanup()
        for file in (self.csv_file, self.console_file):
            with suppress(OSError):  # a full disk was reported by the write; closing only tries the same bytes again
                file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.check()
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"cannot write metrics to {self.folder}: {reason}; free some space, then continue with --resume"
            ) from None

    def _start_csv(self, kept: list[dict[str, Any]]) -> None:
        """Replace the CSV by its kept rows in one go: a kill in between loses none of them."""
        self.columns = list(kept[0]) if kept else []
        write_whole(self.folder / METRICS_CSV, to_csv(self.columns, kept) if kept else "")

    def _start_wandb(self, config: RunConfig) -> Any:
        mode, reason = choose_mode(config.tracking.mode)
        if reason:
            self.console(f"W&B: {reason}")
        if mode == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # seconds to import: only where it is used

        id_file = self.folder / WANDB_ID

        def start(mode: Mode) -> Any:
            return wandb.init(
                project=config.tracking.project,
                group=config.tracking.group,
                name=config.tracking.name or self.folder.name,
                id=id_file.read_text().strip() if id_file.exists() else None,
                resume="allow",
                dir=str(self.folder) if self.scratch is None else self.scratch.name,
                mode=mode,
                config=config.to_values(),
                reinit="create_new" if self.one_of_many else "finish_previous",
                # The config holds the versions that matter; listing every package takes longer than starting the run.
                settings=wandb.Settings(
                    console="off", x_disable_stats=True, x_save_requirements=False, init_timeout=ONLINE_TIMEOUT_S
                ),
            )

        try:
            run = start(mode)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            reason = " ".join(str(error).split())[:200]
            self.console(f"W&B: cannot start online: {reason}; {OFFLINE_HINT}")
            run = start("offline")
        write_whole(id_file, run.id)
        return run


def choose_mode(wanted: Mode | None) -> tuple[Mode, str]:
    """Return the W&B mode, and a line that says why when it is not what was asked for.

    The flag comes first, then WANDB_MODE; online needs an account (WANDB_API_KEY or a netrc entry), and falls back to
    offline without one.
    """
    variable = os.environ.get("WANDB_MODE")
    if wanted is None and variable in ("online", "offline", "disabled"):
        wanted = variable  # type: ignore[assignment]
    if wanted in ("offline", "disabled"):
        return wanted, ""
    if _has_account():
        return "online", ""
    return "offline", f"no account found, {OFFLINE_HINT}"


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", WANDB_URL)).hostname or ""
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Every:
    """Whether it is time for something that is done at most every so many seconds."""

    def __init__(self, interval_s: float):
        self.interval_s, self.last = interval_s, -math.inf

    def __call__(self) -> bool:
        due = time.monotonic() - self.last >= self.interval_s
        if due:
            self.last = time.monotonic()
        return due


def to_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], header: bool = True) -> str:
    """Return rows as CSV text; values of other columns are left out."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: AnyPath) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.csv` as text; none where there is no file.

    A kill or a full disk may have cut the last line: then it lacks columns, and is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [row for row in csv.DictReader(lines) if None not in row.values()]
