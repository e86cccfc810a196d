from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from invdyn.config import load_config
from invdyn.models.registry import load_model_config
from invdyn.training.checkpoint import load_checkpoint
from invdyn.transitions.dataset_config import DatasetConfig

SCRIPTS = ["collect.py", "create_dataset.py", "train.py", "evaluate.py", "sweep.py"]
RunHere = Callable[..., int]


@pytest.fixture
def demo(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_cwd: Path) -> ModuleType:
    """The demo, which would empty a folder of this test where it empties its own."""
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    module = importlib.import_module("demo")
    monkeypatch.setattr(module, "FOLDER", tmp_cwd / "own")
    return module


@pytest.fixture
def commands(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path]]:
    """The commands that the demo runs, with their working directories; none is really run, `evaluate.py` fails."""
    run: list[tuple[list[str], Path]] = []

    def record(command: list[str], *, cwd: Path, check: bool) -> SimpleNamespace:
        run.append((command, cwd))
        return SimpleNamespace(returncode=3 if command[1].endswith("evaluate.py") and "--smoke" in command else 0)

    monkeypatch.setattr(demo.subprocess, "run", record)
    return run


def run_main(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    try:
        demo.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.mark.parametrize("smoke", [True, False])
@pytest.mark.parametrize("number", range(len(SCRIPTS)), ids=SCRIPTS)
def test_each_stage_is_a_command_that_its_script_takes(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int, smoke: bool
) -> None:
    _, command = demo.stages(smoke)[number]
    assert command[0] == SCRIPTS[number]
    script = importlib.import_module(command[0].removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", command)
    args = vars(script.parse_arguments())
    if args.get("smoke") is not None and command[0] != "create_dataset.py":
        assert args["smoke"] == smoke
    for name in ("config", "dataset_config"):
        if args.get(name):
            load_config(DatasetConfig, args[name])
    if args.get("model_config"):
        load_model_config(args["model_config"])


def test_the_stages_hang_together(demo: ModuleType) -> None:
    """Each finds what the one before wrote, and the sweep takes the dataset that the first two make."""
    commands = {command[0]: command for _, command in demo.stages(False)}
    flag = {name: dict(zip(command[1::2], command[2::2], strict=True)) for name, command in commands.items()}
    dataset = flag["collect.py"]["--config"]
    assert flag["create_dataset.py"]["--config"] == flag["train.py"]["--dataset_config"] == dataset
    assert flag["evaluate.py"]["--checkpoint"] == flag["train.py"]["--run_dir"]
    sweep = (Path(demo.ROOT) / "configs/sweep/pendulum.yaml").read_text()
    assert f"dataset_config: {Path(dataset).relative_to(demo.ROOT)}" in sweep


def test_it_runs_them_in_a_folder_and_says_where_the_report_is(
    demo: ModuleType,
    commands: list[tuple[list[str], Path]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/old").touch()
    assert run_main(demo, monkeypatch) == 0
    assert [Path(command[1]).name for command, _ in commands] == SCRIPTS
    assert {cwd for _, cwd in commands} == {tmp_path / "own"}
    assert all(command[0] == sys.executable and Path(command[1]).is_file() for command, _ in commands)
    assert list((tmp_path / "own").iterdir()) == []
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == f"report: {tmp_path / 'own/train/evaluation/report.html'}"
    assert "[5/5] sweep networks and step counts (Ray Tune)\n$ python experiments/sweep.py --output sweep" in output


def test_the_first_stage_that_fails_ends_it(
    demo: ModuleType, commands: list[tuple[list[str], Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_main(demo, monkeypatch, "--smoke", "--output", "mine") == 3
    assert [Path(command[1]).name for command, _ in commands] == SCRIPTS[:4]
    assert {cwd for _, cwd in commands} == {tmp_path / "mine"}


def test_only_its_own_folder_is_emptied(
    demo: ModuleType,
    commands: list[tuple[list[str], Path]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    for path in ("mine", "mine/file"):
        assert run_main(demo, monkeypatch, "--output", path) == 2
        assert capsys.readouterr().err.startswith("error: --output must be a new or empty folder")
    assert (tmp_path / "mine/file").read_text() == "mine"
    assert commands == []


@pytest.mark.slow
def test_the_whole_demo(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "experiments/demo.py", "--smoke", "--output", str(tmp_path / "demo")]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.splitlines()[-1].removeprefix("report: "))
    assert report == tmp_path / "demo/train/evaluation/report.html"
    assert report.is_file()
    load_checkpoint(tmp_path / "demo/train")
    load_checkpoint(tmp_path / "demo/sweep/best")
