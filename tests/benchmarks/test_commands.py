"""Each benchmark runs with tiny arguments and writes its JSON where it is told to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from invdyn.transitions.store import TransitionStore
from tests.benchmarks.conftest import Load


@pytest.fixture
def pendulum(load: Load, tmp_path: Path) -> TransitionStore:
    """A recording of one whole chunk of batches, and more."""
    store: TransitionStore = load("problem").pendulum(str(tmp_path), 400)
    return store


@pytest.fixture
def run(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a benchmark in this process and return its rows by their first column."""

    def run(name: str, *arguments: str) -> dict[str, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--rounds", "1", "--output", str(tmp_path), *arguments])
        load(name).main()
        return read_rows(tmp_path / f"{name}.json")

    return run


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    return {next(iter(row.values())): row for row in json.loads(path.read_text())["rows"]}


@pytest.fixture
def short_rounds(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that say nothing of the speed."""
    monkeypatch.setattr(load("training"), "CHUNKS_PER_ROUND", 1)
    monkeypatch.setattr(load("sampling"), "BATCHES", {1: 20, 500: 2})
    monkeypatch.setattr(load("gpu"), "SMOKE_SAMPLED", {100: 2})


def test_training(run: Any, short_rounds: None) -> None:
    rows = run("training", "--no_compile", "--episodes", "400")
    assert list(rows) == ["reference loop", "same network, eager", "default model, eager"]
    assert rows["reference loop"]["x reference"] == 1
    assert rows["reference loop"]["parameters"] == rows["same network, eager"]["parameters"] == 43_609
    assert all(row["samples/s of CPU"] > 0 for row in rows.values())


def test_a_population_counts_the_rows_of_all_its_models(
    load: Load, pendulum: TransitionStore, without_shape_checks: None
) -> None:
    training = load("training")
    device = torch.device("cpu")
    alone, both = (
        training.population_variant(pendulum, "pendulum_flow.yaml", device, size, compiled=False) for size in (2, 4)
    )
    assert both.samples == 2 * alone.samples == 4 * 64 * 64 * 2  # a chunk in each of two stages
    assert both.parameters == alone.parameters
    alone.run()


def test_sampling(run: Any, short_rounds: None) -> None:
    rows = run("sampling", "--no_compile")
    names = ("reference, 100 steps", "sample(), 1 step(s)", "sample(), 2 step(s)")
    assert list(rows) == [f"{name}, batch {batch}" for batch in ("1", "500") for name in names]
    assert rows["reference, 100 steps, batch 1"]["x reference, 100 steps"] == 1
    assert rows["sample(), 1 step(s), batch 500"]["x reference, 100 steps"] > 10


def test_gpu_on_a_cpu(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, short_rounds: None) -> None:
    """Its tables are those of the other benchmarks, by the device's own clock and limit."""
    flags = ("--device", "cpu", "--smoke", "--no_compile", "--rounds", "1", "--output", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    load("gpu").main()
    assert "sample(), 2 step(s), batch 100" in read_rows(tmp_path / "gpu_sampling_100.json")
    training = read_rows(tmp_path / "gpu_training.json")
    assert list(training) == ["reference loop", "same network, eager", "default model, eager"]
    assert all(0 < row["share of float32 limit"] < 1 for row in training.values())


def test_training_refuses_an_epoch_too_short_to_count(run: Any) -> None:
    with pytest.raises(AssertionError, match="a shorter epoch"):
        run("training", "--no_compile", "--episodes", "20")


def test_accuracy(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("accuracy", "--eager", "--budget_s", "0.1", "--seeds", "1", "--episodes", "100")
    assert set(rows) == {
        *("reference, 100 steps", "reference, 4 steps", "linear base + MLP regression", "linear inverse"),
        *(f"pendulum_flow, {how}" for how in ("1 step", "2 steps", "chosen")),
    }
    assert rows["reference, 100 steps"]["x faster than 100 steps"] == 1
    assert rows["linear inverse"]["RMSE/std, mean"] < 0.1
    assert all(row["spread (max - min)"] == 0 for row in rows.values())


def test_students(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ("--eager", "--budget_s", "0.2", "--seeds", "1", "--episodes", "100", "--steps", "2", "1")
    monkeypatch.setattr(sys, "argv", ["students.py", "--output", str(tmp_path), *flags])
    load("students").main()
    rows = read_rows(tmp_path / "students.json")
    assert list(rows) == ["flow, as chosen", "student, 2 step(s)", "student, 1 step(s)"]
    assert [row["network evaluations"] for row in rows.values()][1:] == [2, 1]
    assert all(row["CPU-s"] > 0 and 0 < row["energy score"] < 2 for row in rows.values())
    assert all(0 <= row["force error"] < 3 and 0 <= row["C2ST"] <= 1 for row in rows.values())


def test_extraction(run: Any, tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "work").mkdir()
    sizes = ["--gigabytes", "0.0001", "--shards", "2", "--warm_up_gb", "0", "--folder", str(tmp_path / "work")]
    rows = run("extraction", *sizes)
    ways = ("create_dataset, one core", "create_dataset, Ray", "plain h5py copy", "loop over steps")
    assert list(rows) == [f"0.0001 GB, {way}" for way in ways]
    assert rows["0.0001 GB, plain h5py copy"]["x copy, wall"] == 1
    assert rows["0.0001 GB, plain h5py copy"]["x loop, CPU"] > 1
    assert all(row["peak MB of a process"] > 10 for row in rows.values())
    assert list((tmp_path / "work").iterdir()) == []


def test_loaders(run: Any, tmp_path: Path) -> None:
    rows = run("loaders", "--rows", "20000", "--steps", "20", "--folder", str(tmp_path))
    assert [row["batch"] for row in rows.values()] == [256, 256, 256, 256, 8192, 8192, 8192, 8192]
    assert all(row["rows/s of CPU"] > 0 for row in rows.values())
    assert rows["plain tensor, batch 256"]["x plain tensor"] == 1


@pytest.mark.slow
def test_sweep_overhead(repository: Path, tmp_path: Path) -> None:
    """In a process of its own: it starts Ray itself."""
    flags = ["--epochs", "1", "--trials", "2", "--episodes", "100", "--wandb", "disabled"]
    run_alone(repository, "sweep_overhead.py", *flags, "--output", str(tmp_path))
    rows = read_rows(tmp_path / "sweep_overhead.json")
    assert list(rows) == ["training steps", "everything else", "Ray's start, shared by all"]
    assert all(row["s per trial"] > 0 for row in rows.values())


@pytest.mark.slow
def test_scaling(repository: Path, tmp_path: Path) -> None:
    run_alone(repository, "scaling.py", "--smoke", "--nodes", "1", "--output", str(tmp_path))
    rows = read_rows(tmp_path / "scaling.json")
    jobs = ("sweep, sleep", "sweep, CPU", "extraction, sleep", "extraction, CPU")
    assert list(rows) == [f"{job}, 1 node(s)" for job in jobs]
    assert all(0 < row["s until all work"] < row["s"] and row["s between tasks"] >= 0 for row in rows.values())
    assert list(read_rows(tmp_path / "driver_cost.json")) == ["trial of one epoch", "epoch of a trial", "shard"]


@pytest.mark.slow
def test_startup(repository: Path, tmp_path: Path) -> None:
    flags = ["--rounds", "1", "--episodes", "100", "--no_compile"]
    run_alone(repository, "startup.py", *flags, "--output", str(tmp_path))
    rows = read_rows(tmp_path / "startup.json")
    total = rows.pop("all")
    for place in ("--local", "Ray, 1 worker", "Ray, 2 workers"):
        assert sum(row[place] for row in rows.values()) == pytest.approx(total[place])
    assert rows["workers started, group joined"]["--local"] == 0
    assert rows["ray.init"]["--local"] < rows["ray.init"]["Ray, 1 worker"]


def run_alone(repository: Path, script: str, *arguments: str) -> None:
    command = [sys.executable, f"experiments/benchmarks/{script}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run(command, cwd=repository, env=environment, check=True, timeout=200)


def test_make_bench_runs_all_of_them(repository: Path) -> None:
    recipe = re.search(r"^bench: setup\n\t(.*)$", (repository / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe is not None
    assert recipe[1] == "$(BIN)/python experiments/benchmarks/run.py"


def test_run_starts_each_once_and_ends_with_the_first_that_fails(
    load: Load, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("run")
    monkeypatch.setattr(script, "import_seconds", lambda: 0.123)
    started: list[str] = []

    def record(command: list[str], *, check: bool, env: dict[str, str]) -> SimpleNamespace:
        assert Path(command[1]).is_file()
        assert env["OMP_NUM_THREADS"] == "1"
        started.append(Path(command[1]).stem)
        return SimpleNamespace(returncode=7 if Path(command[1]).stem == "extraction" else 0)

    monkeypatch.setattr(script.subprocess, "run", record)
    assert exit_code(script, monkeypatch) == 7
    assert started == ["training", "sampling", "accuracy", "students", "extraction"]
    started.clear()
    assert exit_code(script, monkeypatch, "sweep_overhead", "training") == 0
    assert started == ["sweep_overhead", "training"]
    assert "import invdyn: 0.123 s" in capsys.readouterr().out
    assert exit_code(script, monkeypatch, "trainer") == 2
    names = "training, sampling, accuracy, students, extraction, loaders, sweep_overhead, startup, scaling"
    assert f"NAME must be of {names}, got trainer" in capsys.readouterr().err
    assert started == ["sweep_overhead", "training"]


def exit_code(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    try:
        script.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0
