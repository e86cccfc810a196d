"""The leaderboard in pieces, on a few episodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Load

Run = Callable[..., None]


@pytest.fixture
def run(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setattr("invdyn.evaluation.two_sample.STEPS", 20)
    script = load("leaderboard")

    def run(*arguments: str) -> None:
        folders = ("--output", str(tmp_path / "board"), "--folder", str(tmp_path / "data"))
        monkeypatch.setattr(sys, "argv", ["leaderboard.py", "--eager", "--episodes", "150", *folders, *arguments])
        script.main()

    return run


def test_results_are_kept_and_the_page_holds_all_of_them(run: Run, tmp_path: Path) -> None:
    flags = ("--problems", "pendulum_dead_zone", "--budget", "0.1")
    run(*flags, "--models", "linear; physical oracle; Gaussian", "--seeds", "0")
    board = tmp_path / "board"
    files = sorted(path.relative_to(board / "results").as_posix() for path in board.glob("results/*/*/*.json"))
    assert files == [f"pendulum_dead_zone/{name}/seed-0.json" for name in ("gaussian", "linear", "physical-oracle")]
    oracle, gaussian = (json.loads((board / "results" / files[index]).read_text()) for index in (2, 0))
    assert oracle["force_error"] < 1e-4
    assert oracle["coverage_90"] == pytest.approx(0.9, abs=0.12)
    assert gaussian["nll_per_dim"] is not None
    assert oracle["nll_per_dim"] is None
    assert {"cpu", "commit"} <= gaussian["machine"].keys()
    chosen = json.loads((board / "choices/pendulum_dead_zone/gaussian.json").read_text())
    assert chosen["chosen"] == gaussian["chosen"]
    assert len(chosen["tried"]) == 2
    best = min(chosen["tried"], key=lambda each: each["energy_score"])
    assert chosen["chosen"] == best["overrides"]

    times = {path: path.stat().st_mtime_ns for path in board.glob("results/*/*/*.json")}
    run(*flags, "--models", "linear", "--seeds", "0,1")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    rows = json.loads((board / "leaderboard.json").read_text())["board"]["pendulum_dead_zone"]
    assert rows[0]["model"] == "physical oracle"
    assert {row["model"]: row["seeds"] for row in rows}["linear"] == [0, 1]
    page = (board / "README.md").read_text()
    assert page.count("\n| physical oracle |") == page.count("\n| Gaussian |") == 1

    run(*flags[:3], "0.2", "--models", "linear", "--seeds", "0")
    assert json.loads((board / "results/pendulum_dead_zone/linear/seed-0.json").read_text())["budget_s"] == 0.2


def test_peers_need_their_environment(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--problems", "pendulum_dead_zone", "--models", "sbi NPE")
    assert "left out, --peers is not given" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--problems", "pendulum"), ("--models", "flows")])
def test_unknown_names_are_refused(run: Run, capsys: pytest.CaptureFixture[str], flags: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        run(*flags)
    assert f"got {flags[1]!r}" in capsys.readouterr().err
