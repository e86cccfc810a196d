from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.conftest import Load


@pytest.fixture
def measure(load: Load) -> ModuleType:
    return load("measure")


def test_variants_take_turns_after_one_round_to_warm_up(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = 0.0, ""

    def spend(name: str, first: float, later: float) -> None:
        nonlocal clock, order
        clock += later if name in order else first
        order += name

    monkeypatch.setattr(measure, "cpu_seconds", lambda: clock)
    times = measure.interleave({"a": lambda: spend("a", 100, 2), "b": lambda: spend("b", 50, 3)}, rounds=3)
    assert order == "abababab"
    assert times == {"a": [2, 2, 2], "b": [3, 3, 3]}


def test_another_clock(measure: ModuleType) -> None:
    """A GPU has a clock of its own, which runs the variants."""
    times = measure.interleave({"a": lambda: 3.0, "b": lambda: 4.0}, rounds=2, seconds=lambda run: run())
    assert times == {"a": [3.0, 3.0], "b": [4.0, 4.0]}


def test_the_ratio_is_the_median_of_the_rounds_ratios(measure: ModuleType) -> None:
    """Not the ratio of the medians, here 2: a round that the machine slowed counts as one."""
    assert measure.ratio([1, 40, 8], [1, 4, 4]) == 2
    assert measure.ratio([3, 2, 10], [1, 2, 1]) == 3
    assert measure.ratio([2.0], [2.0]) == 1
    with pytest.raises(ValueError, match="zip"):
        measure.ratio([1, 2], [1])


def test_cpu_time_counts_work_and_not_waiting(measure: ModuleType) -> None:
    started = measure.cpu_seconds()
    time.sleep(0.2)
    waited = measure.cpu_seconds() - started
    while measure.cpu_seconds() - started < waited + 0.1:
        math.factorial(500)
    assert waited < 0.15


def test_the_report(measure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"way": "one", "x": 1234.5678, "y": 0.1234567}, {"way": "another", "x": 2.0, "n": 7}]
    measure.report("name", "what it is", rows, tmp_path / "new")
    written = json.loads((tmp_path / "new/name.json").read_text())
    assert (written["title"], written["rows"]) == ("what it is", rows)
    assert {"cpu", "date", "torch", "commit"} <= written["machine"].keys()
    assert capsys.readouterr().out.splitlines() == [
        "",
        "what it is",
        "way          x      y  n",
        "-------  -----  -----  -",
        "one      1,235  0.123   ",
        "another      2         7",
        f"written: {tmp_path / 'new/name.json'}",
    ]


def test_results_go_into_the_project_by_default(measure: ModuleType, repository: Path) -> None:
    parser = argparse.ArgumentParser()
    measure.add_arguments(parser)
    args = parser.parse_args([])
    assert (args.rounds, args.output) == (measure.ROUNDS, repository / "runs/benchmarks")
    assert measure.ROUNDS >= 5
