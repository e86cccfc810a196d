from __future__ import annotations

import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

COLLECT = {
    "env_id": "InvertedPendulumIntegrable-v5",
    "num_episodes": 40,
    "episodes_per_shard": 10,
    "max_episode_steps": 50,
    "state_limits": {0: 0.95, 1: 1.2},
}


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    return importlib.import_module("collect")


def write_config(folder: Path, buffer: str = "sequence/pendulum", **collect: Any) -> Path:
    path = folder / f"{buffer.replace('/', '-')}.yaml"
    values = {"name": "pendulum", "buffer_path": str(folder / buffer), "collect": {**COLLECT, **collect}}
    path.write_text(yaml.safe_dump(values))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_here(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["collect.py", *map(str, arguments)])
    script.main()


def start(repository: Path, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(repository / "experiments" / "collect.py"), "--local", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def test_same_bytes_whatever_the_number_of_workers(
    tmp_path: Path,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    ray_session: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_here(script, monkeypatch, "--config", write_config(tmp_path, "sequence/local"), "--local")
    expected = contents(tmp_path / "sequence/local")
    assert len(expected) == 4
    for workers in (1, 3):
        config = write_config(tmp_path, f"sequence/workers{workers}")
        run_here(script, monkeypatch, "--config", config, "--num_workers", workers)
        assert contents(tmp_path / f"sequence/workers{workers}") == expected
        place = "ray: this machine, 1 node(s), 8 CPUs, 0 GPUs; uses "
        assert f"{place}at most {workers} tasks at a time, 1 CPU each\n" in capsys.readouterr().err


def test_errors_of_a_ray_task_are_one_line(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    from invdyn.errors import ConfigError

    config = write_config(tmp_path, state_limits={0: 1e-9}, num_episodes=1)
    with pytest.raises(ConfigError, match=r"^state_limits must leave room for one step; [^\n]*$"):
        run_here(script, monkeypatch, "--config", config)


def test_summary_and_notes(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, state_limits=None, max_episode_steps=200)
    run_here(script, monkeypatch, "--config", config, "--local")
    captured = capsys.readouterr()
    assert "recorded 40 episodes, 8000 transitions in" in captured.out
    assert f"4 shards in {tmp_path / 'sequence/pendulum'}" in captured.out
    assert "states touch joint limits" in captured.out
    assert "40/40 episodes (100%)" in captured.err


def test_smoke_and_overrides(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, num_episodes=100_000)
    run_here(script, monkeypatch, "--config", config, "--local", "--smoke", "--set", "collect.seed=5")
    import h5py

    episodes = 0
    for shard in sorted((tmp_path / "sequence/pendulum").iterdir()):
        with h5py.File(shard) as file:
            assert file.attrs["seed"] == 5
            episodes += len(file["meta/episode_ends"])
    assert episodes == script.SMOKE_EPISODES < 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "collect.env_id=InvertedPendulumIntegrabel-v5"], "did you mean 'InvertedPendulumIntegrable-v5'"),
        (["--set", "collect.state_limits={9: 1}"], "state_limits must name dimensions from 0 to 3, got 9"),
        (["--set", "collect.physics={armature: 2}"], "armature multiplier must be 1"),
        (["--set", "collect.policyy={}"], "unknown key 'collect.policyy'; did you mean 'policy'"),
        (["--set", "collect=null"], "must have a collect section"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, repository: Path, arguments: list[str], message: str) -> None:
    config = write_config(tmp_path)
    code, output, errors = finish(start(repository, "--config", config, *arguments, cwd=tmp_path))
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert list(tmp_path.iterdir()) == [config]


def test_finished_recording_is_refused_then_overwritten(tmp_path: Path, repository: Path) -> None:
    config, folder = write_config(tmp_path), tmp_path / "sequence/pendulum"
    assert finish(start(repository, "--config", config))[0] == 0
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    code, _, errors = finish(start(repository, "--config", config, "--set", "collect.seed=1"))
    assert code == 2
    assert errors.startswith("error: buffer_path must not hold a recording yet")
    assert contents(folder) == before
    assert finish(start(repository, "--config", config, "--set", "collect.seed=1", "--overwrite"))[0] == 0
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after["notes.txt"] == b"mine"
    assert after["shard-00000.hdf5"] != before["shard-00000.hdf5"]


def test_disk_full(tmp_path: Path, repository: Path) -> None:
    config, folder = write_config(tmp_path, num_episodes=200, episodes_per_shard=199), tmp_path / "sequence/pendulum"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    code, _, errors = finish(start(repository, "--config", config, preexec_fn=limit_file_size))
    assert code == 2
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    assert "disk full while writing" in message[0]
    assert "shard-00000.hdf5" in message[0]
    assert sorted(contents(folder)) == [".collecting.json", "notes.txt"]
    assert finish(start(repository, "--config", config))[0] == 0
    assert sorted(contents(folder)) == ["notes.txt", "shard-00000.hdf5", "shard-00001.hdf5"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_recording_continues(tmp_path: Path, repository: Path, stop: signal.Signals) -> None:
    sizes = {"num_episodes": 3000, "episodes_per_shard": 100}
    config, folder = write_config(tmp_path, **sizes), tmp_path / "sequence/pendulum"
    process = start(repository, "--config", config)
    deadline = time.monotonic() + 60
    while not (folder / "shard-00002.hdf5").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(stop)
    code, _, errors = finish(process)
    stopped = contents(folder)
    assert code == (-signal.SIGKILL if stop == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    assert ".collecting.json" in stopped
    shards = {name: content for name, content in stopped.items() if name.startswith("shard-")}
    assert 3 <= len(shards) < 30
    code, _, errors = finish(start(repository, "--config", config))
    assert code == 0
    assert f"continuing: {len(shards)} of 30 shards are there already" in errors
    whole = write_config(tmp_path, "sequence/whole", **sizes)
    assert finish(start(repository, "--config", whole))[0] == 0
    assert contents(folder) == contents(tmp_path / "sequence/whole")
    assert shards.items() <= contents(folder).items()
