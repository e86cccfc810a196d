from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from invdyn.errors import DataError
from invdyn.training import tracking
from invdyn.training.run_config import RunConfig
from invdyn.training.tracking import Tracker, choose_mode
from invdyn.transitions.store import TransitionStore
from tests.training.runs import run_config

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def config(store: TransitionStore, tmp_path: Path) -> RunConfig:
    return run_config(store, tmp_path / "run")


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def lines(config: RunConfig) -> list[str]:
    return (Path(config.run_dir) / "metrics.csv").read_text().splitlines()


def test_rows_are_on_disk_at_once(config: RunConfig) -> None:
    tracker = Tracker(config, echo=False)
    tracker.log({"epoch": 1, "val_loss": 0.1 + 0.2}, 5)
    tracker.console("first line")
    assert lines(config) == ["step,epoch,val_loss", "5,1,0.30000000000000004"]
    assert (Path(config.run_dir) / "train.log").read_text() == "first line\n"
    tracker.close()


def test_a_resumed_run_drops_rows_after_its_checkpoint(config: RunConfig) -> None:
    tracker = Tracker(config, echo=False)
    for step in (5, 10, 15):
        tracker.log({"loss": step / 10}, step)
    tracker.close()
    with (Path(config.run_dir) / "metrics.csv").open("a") as file:
        file.write("2")  # a line cut short: 20 would be later, 2 is not
    resumed = Tracker(config, resumed_step=10, echo=False)
    assert lines(config) == ["step,loss", "5,0.5", "10,1.0"]
    resumed.log({"loss": 7}, 15)
    resumed.close()
    assert lines(config) == ["step,loss", "5,0.5", "10,1.0", "15,7"]
    Tracker(config, resumed_step=0, echo=False).close()
    assert lines(config) == []


def test_a_kill_while_resuming_loses_no_rows(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(config, echo=False)
    tracker.log({"loss": 1}, 5)
    tracker.close()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Tracker(config, resumed_step=5, echo=False)
    assert lines(config) == ["step,loss", "5,1"]


def test_console_is_echoed_when_asked_for(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for echo in (True, False):
        tracker = Tracker(config, echo=echo)
        tracker.console(f"echo {echo}")
        tracker.close()
    assert capsys.readouterr().out == "echo True\n"
    assert (Path(config.run_dir) / "train.log").read_text() == "echo True\necho False\n"


def test_disabled_writes_csv_only(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    tracker = Tracker(config, echo=False)
    tracker.log({"loss": 1}, 1)
    tracker.summarize({"loss": 1})
    tracker.close()
    assert sorted(path.name for path in Path(config.run_dir).iterdir()) == ["metrics.csv", "train.log"]


def test_disk_full_is_one_line(config: RunConfig) -> None:
    tracker = Tracker(config, echo=False)
    full = os.open("/dev/full", os.O_WRONLY)
    assert tracker.csv_file.file is not None
    os.dup2(full, tracker.csv_file.file.fileno())
    os.close(full)
    with pytest.raises(DataError, match=r"^cannot write metrics to .*/run: No space left on device; .*--resume$"):
        tracker.log({"loss": 1}, 1)
    tracker.close()


def test_offline_run_keeps_its_id_over_a_resume(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "run", tracking={"mode": "offline", "group": "sweep", "name": "trial"})
    ids = []
    for step in (0, 1):
        tracker = Tracker(config, resumed_step=step, echo=False)
        run = tracker.wandb_run
        assert (run.group, run.name, run.settings.mode) == ("sweep", "trial", "offline")
        assert run.config["training"]["num_epochs"] == config.training.num_epochs
        ids.append(run.id)
        tracker.log({"loss": 1.0}, step + 1)
        tracker.summarize({"final": 2.0})
        assert run.summary["final"] == 2.0
        tracker.close()
    assert ids[0] == ids[1] == (tmp_path / "run/wandb_run_id.txt").read_text()
    recorded = list((tmp_path / "run/wandb").glob(f"offline-run-*-{ids[0]}"))
    assert recorded
    assert all(list(folder.glob("*.wandb")) for folder in recorded)


def test_no_network_falls_back_to_offline(
    store: TransitionStore, tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens here
    monkeypatch.setattr(tracking, "ONLINE_TIMEOUT_S", 1.0)
    tracker = Tracker(run_config(store, tmp_path / "run", tracking={"mode": "online"}), echo=False)
    assert tracker.wandb_run.settings.mode == "offline"
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    log = (tmp_path / "run/train.log").read_text()
    assert log.startswith("W&B: cannot start online: ")
    assert log.endswith(
        "recording offline; send it later with `wandb login` and `wandb sync RUN_DIR/wandb/offline-run-*`\n"
    )
    assert log.count("\n") == 1


def test_no_account_says_so_in_one_line(
    store: TransitionStore, tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wandb.init", _fake_init)
    tracker = Tracker(run_config(store, tmp_path / "run", tracking={"mode": "online"}), echo=False)
    assert tracker.wandb_run.mode == "offline"
    tracker.close()
    log = (tmp_path / "run/train.log").read_text()
    assert log.startswith("W&B: no account found, recording offline; send it later with ")
    assert log.count("\n") == 1


def test_the_flag_comes_first_then_the_environment_then_the_account(
    no_account: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def modes() -> list[str]:
        return [choose_mode(wanted)[0] for wanted in (None, "online", "offline", "disabled")]

    assert modes() == ["offline", "offline", "offline", "disabled"]
    assert choose_mode(None)[1].startswith("no account found")
    assert choose_mode("offline")[1] == ""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert modes() == ["online", "online", "offline", "disabled"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert modes() == ["disabled", "online", "offline", "disabled"]
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert modes()[0] == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert modes()[0] == "online"


class _FakeRun:
    id = "abc"

    def __init__(self, mode: str):
        self.mode = mode

    def finish(self, exit_code: int) -> None:
        assert exit_code == 0


def _fake_init(**values: Any) -> _FakeRun:
    return _FakeRun(values["mode"])
