"""Metrics of a run: a local CSV always, W&B where wanted, and the console."""

from __future__ import annotations

import csv
import netrc
import os
from pathlib import Path
from typing import Any, Literal

from invdyn.training.run_config import RunConfig

METRICS_CSV = "metrics.csv"
CONSOLE_LOG = "train.log"
WANDB_ID = "wandb_run_id.txt"
WANDB_HOST = "api.wandb.ai"

Mode = Literal["online", "offline", "disabled"]


class Tracker:
    """Writes rows of metrics. A resumed run continues its CSV after the checkpoint's step, and the same W&B run.

    Args:
        config: the run.
        resumed_step: step of the checkpoint that the run continues from; 0 for a new run.
        echo: print console lines too; where the trainer is another process, the command shows the log file instead.
    """

    def __init__(self, config: RunConfig, resumed_step: int = 0, echo: bool = True):
        self.folder = Path(config.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.echo = echo
        self.console_file = (self.folder / CONSOLE_LOG).open("a", encoding="utf-8", buffering=1)
        kept = _rows_until(self.folder / METRICS_CSV, resumed_step)
        self.csv_file = (self.folder / METRICS_CSV).open("w", encoding="utf-8", newline="", buffering=1)
        self.writer: csv.DictWriter[str] | None = None
        for row in kept:
            self._write(row)
        self.wandb_run = self._start_wandb(config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record one row; every row of a run has the same columns."""
        self._write({"step": step, **metrics})
        if self.wandb_run is not None:
            self.wandb_run.log(metrics, step=step)

    def summarize(self, values: dict[str, float]) -> None:
        """Put values into the W&B run's summary."""
        if self.wandb_run is not None:
            self.wandb_run.summary.update(values)

    def console(self, line: str) -> None:
        """Show one line to whoever watches the run."""
        self.console_file.write(line + "\n")
        if self.echo:
            print(line, flush=True)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run and the files."""
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=exit_code)
        self.csv_file.close()
        self.console_file.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self.writer is None:
            self.writer = csv.DictWriter(self.csv_file, fieldnames=list(row), extrasaction="ignore")
            self.writer.writeheader()
        self.writer.writerow(row)

    def _start_wandb(self, config: RunConfig) -> Any:
        mode, reason = choose_mode(config.tracking.mode)
        if reason:
            self.console(f"W&B: {reason}")
        if mode == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # seconds to import: only where it is used

        id_file = self.folder / WANDB_ID
        run = wandb.init(
            project=config.tracking.project,
            group=config.tracking.group,
            name=config.tracking.name or self.folder.name,
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
            dir=str(self.folder),
            mode=mode,
            config=config.to_values(),
            reinit="finish_previous",
            settings=wandb.Settings(console="off", x_disable_stats=True),
        )
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
    hint = "recording offline; send it later with `wandb login` and `wandb sync RUN_DIR/wandb/offline-run-*`"
    return "offline", f"no account found, {hint}"


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    if step == 0 or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= step]
