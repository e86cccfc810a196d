"""Metrics of a run: a local CSV always, W&B where wanted, and the console."""

from __future__ import annotations

import csv
import netrc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from invdyn.errors import DataError
from invdyn.training.run_config import RunConfig

METRICS_CSV = "metrics.csv"
CONSOLE_LOG = "train.log"
WANDB_ID = "wandb_run_id.txt"
ONLINE_TIMEOUT_S = 30.0
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
    """

    def __init__(self, config: RunConfig, resumed_step: int = 0, echo: bool = True, *, one_of_many: bool = False):
        self.folder = Path(config.run_dir)
        self.echo, self.one_of_many = echo, one_of_many
        self.columns: list[str] = []
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.console_file = (self.folder / CONSOLE_LOG).open("a", encoding="utf-8", buffering=1)
            self._start_csv(_rows_until(self.folder / METRICS_CSV, resumed_step))
            self.csv_file = (self.folder / METRICS_CSV).open("a", encoding="utf-8", newline="", buffering=1)
        self.wandb_run = self._start_wandb(config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record one row; every row of a run has the same columns."""
        row = {"step": step, **metrics}
        with self._writing():
            if not self.columns:
                self.columns = list(row)
                csv.writer(self.csv_file).writerow(self.columns)
            csv.DictWriter(self.csv_file, self.columns, extrasaction="ignore").writerow(row)
        if self.wandb_run is not None:
            self.wandb_run.log(metrics, step=step)

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
        for file in (self.csv_file, self.console_file):
            with suppress(OSError):  # a full disk was reported by the write; closing only tries the same bytes again
                file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"cannot write metrics to {self.folder}: {reason}; free some space, then continue with --resume"
            ) from None

    def _start_csv(self, kept: list[dict[str, Any]]) -> None:
        """Replace the CSV by its kept rows in one go: a kill in between loses none of them."""
        path = self.folder / METRICS_CSV
        temporary = path.with_name(f".{path.name}.tmp")
        self.columns = list(kept[0]) if kept else []
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if kept:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(kept)
        temporary.replace(path)

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
                dir=str(self.folder),
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
        id_file.write_text(run.id)
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


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    if step == 0 or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        # A kill or a full disk may have cut the last line: then it lacks columns.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [row for row in rows if int(row["step"]) <= step]
