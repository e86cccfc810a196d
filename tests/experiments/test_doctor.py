from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.doctor.recordings import record, write_shards


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    """The command as a module: its own folder is on the path when it is run."""
    folder = repository / "experiments"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("doctor_command", folder / "doctor.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def run_here(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, arguments)])
    try:
        script.run_command(script.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_shards(tmp_path / "recording", *record(30))
    path = tmp_path / "masses.yaml"
    path.write_text(yaml.safe_dump({"name": "masses", "buffer_path": str(tmp_path / "recording")}))
    return path


def test_clean_recording_passes_strictly(config: Path, tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "experiments/doctor.py"), "--config", str(config), "--strict"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("doctor: masses: 0 errors, 0 warnings\nnative: 1,830 states in 30 episodes")
    assert result.stdout.endswith("report: runs/doctor/masses/doctor.html\n")
    assert json.loads((tmp_path / "runs/doctor/masses/doctor.json").read_text())["name"] == "masses"


def test_errors_fail_only_where_asked(
    config: Path,
    tmp_path: Path,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    states, actions = record(30, 20)
    states[3][5, 0] = float("nan")
    write_shards(tmp_path / "recording", states, actions)
    arguments = ["--config", config, "--output", tmp_path / "out", "--max_rows", 10_000, "--set", "history=1"]
    assert run_here(script, monkeypatch, *arguments) == 0
    capsys.readouterr()
    assert run_here(script, monkeypatch, *arguments, "--strict") == 1
    output = capsys.readouterr().out
    assert "hold NaN or infinity in state" in output
    assert "shard-00000.hdf5: episode 3, step 5" in output
    assert "history 1" in output
    assert (tmp_path / "out/doctor.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "buffer_path=nowhere"], "nowhere"),
        (["--set", "gapp=2"], "did you mean 'gap'"),
        (["--max_rows", "0"], "must be a whole number above 0"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    config: Path,
    tmp_cwd: Path,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_here(script, monkeypatch, "--config", config, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert not (tmp_cwd / "runs").exists()
