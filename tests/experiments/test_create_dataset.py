from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from tests.sequences.recordings import make_episodes, write_recording, write_shard
from tests.transitions.datasets import LENGTHS, contents

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    return importlib.import_module("create_dataset")


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process as a shell would: (exit code, standard output, standard error)."""

    def run_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["create_dataset.py", *map(str, arguments)])
        code: Any = 0
        try:
            script.run_command(script.main)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return int(code), captured.out, captured.err

    return run_here


def write_config(folder: Path, **values: Any) -> Path:
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump({"name": "d", "buffer_path": str(folder / "sequence/r"), **values}))
    return path


def start(repository: Path, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(repository / "experiments/create_dataset.py"), "--local", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def assert_error(result: tuple[int, str, str], message: str) -> None:
    code, output, errors = result
    assert (code, output) == (2, "")
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert errors.endswith(lines[0] + "\n")
    assert "Traceback" not in errors
    assert re.search(message, lines[0]), lines[0]


# What the command prints and writes


def test_summary(tmp_path: Path, run: Run) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    code, output, errors = run("--config", write_config(tmp_path, gap=2), "--local", "--max_samples", 50)
    assert code == 0
    assert output.startswith("50 transitions: train 40 (7 episodes), val ")
    assert "dropped actions: no_next_state 14, max_samples 33\n" in output
    assert f"dataset: {tmp_path}/inverse_dynamics/r\n" in output
    assert "extract d: 50/50 transitions (100%)" in errors
    files = contents(tmp_path / "inverse_dynamics/r")
    assert files.keys() >= {"manifest.json", "distributions.png", "train/part-00000.h5", "val/part-00000.h5"}
    assert files["distributions.png"].startswith(b"\x89PNG")
    assert not any(name.startswith(".") for name in files)
    manifest = json.loads(files["manifest.json"])
    assert manifest["drops"] == {"no_next_state": 14, "no_horizon": 0, "no_history": 0, "max_samples": 33}


def test_more_samples_than_there_are(tmp_path: Path, run: Run) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    code, output, _ = run("--config", write_config(tmp_path), "--local", "--max_samples", 5000)
    rows = json.loads((tmp_path / "inverse_dynamics/r/manifest.json").read_text())["num_rows"]
    assert code == 0
    assert f"warning: --max_samples asks for 5,000 transitions, there are {rows}: all are kept\n" in output


def test_interrupted_after_the_dataset_is_written(
    tmp_path: Path, run: Run, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    monkeypatch.setattr(script, "diagnose", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    code, _, errors = run("--config", write_config(tmp_path), "--local")
    assert code == 130
    assert errors.endswith(f"interrupted; the dataset is finished: {tmp_path}/inverse_dynamics/r\n")


def test_the_next_command_can_be_pasted(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "my data"
    write_recording(folder / "sequence/r", make_episodes(LENGTHS))
    config = write_config(folder)
    code, output, _ = run("--config", config, "--local", "--set", "gap=2", "--set", "val_ratio=0.2")
    assert code == 0
    last = output.splitlines()[-1]
    assert last == f"more: python experiments/doctor.py --config '{config}' --set gap=2 --set val_ratio=0.2"


def test_the_scan_for_the_filters_shows_how_far_it_is(tmp_path: Path, run: Run) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    config = write_config(tmp_path, filters={"drop_stale": True, "drop_jumps": 50.0}, part_size_mb=700 / 2**20)
    code, _, errors = run("--config", config, "--local")
    assert code == 0
    parts = len(list((tmp_path / "inverse_dynamics/r/train").glob("*.h5")))
    scanned, total = map(int, re.search(r"scan d: (\d+)/(\d+) parts \(100%\)", errors).groups())  # type: ignore[union-attr]
    assert scanned == total >= parts + 1  # a task per part, and one that measures the typical step
    assert errors.index("scan d") < errors.index("extract d")


def test_smoke_limits_the_rows_unless_told(tmp_path: Path, run: Run) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes([300] * 5))
    config = write_config(tmp_path)
    assert run("--config", config, "--local", "--smoke")[1].startswith("1,000 transitions")
    assert run("--config", config, "--local", "--smoke", "--overwrite", "--max_samples", 7)[1].startswith("7 trans")
    assert run("--config", config, "--local", "--overwrite")[1].startswith("1,500 transitions")


def test_on_ray(tmp_path: Path, run: Run, ray_session: None) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    config = write_config(tmp_path, part_size_mb=0.001)
    code, _, errors = run("--config", config, "--num_workers", 2)
    assert code == 0
    assert "8 CPUs, 0 GPUs; uses at most 2 tasks at a time, 1 CPU each\n" in errors
    assert run("--config", config, "--local", "--set", f"output_path={tmp_path}/local")[0] == 0
    assert contents(tmp_path / "inverse_dynamics/r") == contents(tmp_path / "local")


# Bad input: one line, exit code 2, nothing written and nothing lost


def no_change(folder: Path) -> dict[str, Any]:
    return {}


def remove_recording(folder: Path) -> dict[str, Any]:
    for path in sorted((folder / "sequence").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    return {}


def remove_shards(folder: Path) -> dict[str, Any]:
    for path in (folder / "sequence/r").iterdir():
        path.unlink()
    return {}


def truncate(folder: Path) -> dict[str, Any]:
    shard = folder / "sequence/r/shard-00001.hdf5"
    shard.write_bytes(shard.read_bytes()[:4000])
    return {}


def add_shard(*, lengths: tuple[int, ...] = (5, 6), **options: Any) -> Callable[[Path], dict[str, Any]]:
    """Add a shard that is wrong in one way."""

    def change(folder: Path) -> dict[str, Any]:
        write_shard(folder / "sequence/r/shard-00009.hdf5", make_episodes(lengths), **options)
        return {}

    return change


def put(value: float, *, key: str, dtype: type = np.float64) -> Callable[[Path], dict[str, Any]]:
    """Record one bad value at episode 2, step 3 of the second shard."""

    def change(folder: Path) -> dict[str, Any]:
        episodes = make_episodes(LENGTHS, dtype=dtype)
        episodes[6][0 if key == "state" else 1][3, 1] = value
        write_recording(folder / "sequence/r", episodes)
        return {}

    return change


def config_of(**values: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_recording, r"recording not found: .*/sequence/r; make it with experiments/collect\.py"),
        (remove_shards, r"recording has no shards: no file ending in .*\.hdf5.* in .*/sequence/r"),
        (truncate, r"truncated, corrupt or .*shard-00001\.hdf5: "),
        (
            add_shard(arrays={"data/state": np.zeros((4, 3))}),
            r"lengths disagree: .*shard-00009\.hdf5: data/state has 4 rows, meta/state_ends ends at 13",
        ),
        (
            add_shard(arrays={"data/action": np.zeros((4, 2))}),
            r"lengths disagree: .*shard-00009\.hdf5: data/action has 4 rows",
        ),
        (
            add_shard(arrays={"meta/state_ends": np.array([4, 13])}),
            r"lengths disagree: .*shard-00009\.hdf5: episode 0 has 4 states and 5 actions",
        ),
        (
            add_shard(without=["meta/episode_ends"]),
            r"shard-00009\.hdf5 has no 'meta/episode_ends'; found data/action",
        ),
        (add_shard(without=["data/state"]), r"key 'data/state' must be an array: .*shard-00009\.hdf5"),
        (
            add_shard(arrays={"data/action": np.array([b"up"] * 11)}),
            r"data/action must be numeric: .*shard-00009\.hdf5",
        ),
        (add_shard(arrays={"data/action": np.zeros((11, 3))}), r"dimensions: .*shard-00009\.hdf5 has \(3, 3\)"),
        (add_shard(lengths=(5, 0, 6)), r"at least 2 states and 1 action: .*shard-00009\.hdf5: episode 1 has 1 states"),
        (put(np.nan, key="state"), r"shard-00001\.hdf5: state holds nan in column 1 at episode 2, step 3"),
        (put(np.inf, key="state"), r"shard-00001\.hdf5: state holds inf in column 1 at episode 2, step 3"),
        (put(-np.inf, key="action"), r"shard-00001\.hdf5: action holds -inf in column 1 at episode 2, step 3"),
        (put(np.nan, key="action", dtype=np.float32), r"shard-00001\.hdf5: action holds nan .* at episode 2, step 3"),
        (put(1e39, key="state"), r"finite as float32: .*shard-00001\.hdf5: state holds 1e\+39 .* at episode 2, step 3"),
        (config_of(gap=13), "no transitions left: gap 13, horizon 1 .*; the longest of 14 has 13 states"),
        (config_of(history=40), "no transitions left: .* history 40"),
        (config_of(gap=12), "each split needs an episode of its own: 1 episodes cannot give 1 to val, 1 to test"),
        (config_of(val_ratio=0.5, test_ratio=0.49), "each split needs an episode of its own: 14 episodes cannot give"),
        (config_of(val_ratio=0.6, test_ratio=0.5), r"dataset\.yaml: val_ratio \+ test_ratio must be below 1"),
        (config_of(buffer_path="/data/recordings/r"), "buffer_path must contain '/sequence/' .*; give output_path"),
        (lambda folder: {"output_path": f"{folder}/sequence/./r/"}, "output_path must be another folder than the rec"),
        (config_of(shape_meta={"obs": {"state": {"shape": [7]}}}), "state is stated as 7 numbers, .* has 3"),
        (config_of(shape_meta={"obs": {"position": {}}}), "key 'data/position' must be an array: .*set shape_meta.obs"),
        (config_of(val_ration=0.2), r"dataset\.yaml: unknown key 'val_ration'; did you mean 'val_ratio'\?"),
        (
            config_of(shape_meta={"obs": {"state": {"shap": [3]}}}),
            r"'shape_meta\.obs\.state\.shap'; did you mean 'shape'\?",
        ),
        (config_of(shape_meta={"obs": {}}), r"dataset\.yaml: shape_meta\.obs: .* at least 1 item"),
        (config_of(gap=0), r"dataset\.yaml: gap: .*greater than or equal to 1, got 0"),
        (config_of(gap="two"), r"dataset\.yaml: gap: .*integer.*, got 'two'"),
        (config_of(val_ratio=float("nan")), r"dataset\.yaml: val_ratio: .*, got nan"),
        (config_of(format="hdf6"), "unknown format 'hdf6'; known formats: .*native"),
        (config_of(name=None), r"dataset\.yaml: name: "),
    ],
)
def test_bad_input_writes_nothing(
    tmp_path: Path, run: Run, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    config = write_config(tmp_path, **change(tmp_path))
    before = contents(tmp_path)
    assert_error(run("--config", config, "--local"), message)
    after = contents(tmp_path)
    # Values are read by the tasks: what they had finished by then is kept for the run after the repair.
    kept = {name for name in after if name.startswith("inverse_dynamics/r/")}
    assert not kept or "finite" in message or "holds" in message
    assert "inverse_dynamics/r/manifest.json" not in kept
    assert {name: content for name, content in after.items() if name not in kept} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config file not found: .*/dataset\.yaml"),
        ("name: [d", r"dataset\.yaml is not valid YAML: line 1, column"),
        ("a: 1\n\tb: 2", r"dataset\.yaml is not valid YAML: line 2, column 1"),
        ("", r"dataset\.yaml must hold a mapping of names to values, got NoneType"),
        ("- name", r"dataset\.yaml must hold a mapping of names to values, got list"),
        ("name: d", r"dataset\.yaml: required key 'buffer_path' is missing"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path: Path, run: Run, text: str | None, message: str) -> None:
    path = tmp_path / "dataset.yaml"
    if text is not None:
        path.write_text(text)
    before = contents(tmp_path)
    assert_error(run("--config", path, "--local"), message)
    assert contents(tmp_path) == before


def test_misspelt_file_name_is_suggested(tmp_path: Path, run: Run) -> None:
    write_config(tmp_path)
    assert_error(run("--config", tmp_path / "dataset.yml", "--local"), r"did you mean .*/dataset\.yaml\?")


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
def test_max_samples_must_be_a_number_above_0(tmp_path: Path, run: Run, value: str) -> None:
    code, _, errors = run("--config", write_config(tmp_path), f"--max_samples={value}")
    assert code == 2
    assert f"argument --max_samples: must be a whole number above 0, got '{value}'" in errors


def test_bad_input_does_not_start_ray(
    tmp_path: Path, run: Run, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("Ray was started for nothing")

    monkeypatch.setattr(script, "connect", fail)
    assert_error(run("--config", write_config(tmp_path)), "recording not found")
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    with pytest.raises(AssertionError, match="for nothing"):
        run("--config", write_config(tmp_path))
    assert not (tmp_path / "inverse_dynamics").exists()


def test_finished_dataset_is_refused_then_overwritten(tmp_path: Path, run: Run) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    config, folder = write_config(tmp_path), tmp_path / "inverse_dynamics/r"
    assert run("--config", config, "--local")[0] == 0
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    for more in ((), ("--set", "gap=2"), ("--max_samples", 20)):
        assert_error(run("--config", config, "--local", *more), r"dataset exists already: .*/r; give --overwrite")
        assert contents(folder) == before
    assert run("--config", config, "--local", "--set", "gap=2", "--overwrite")[0] == 0
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after["notes.txt"] == b"mine"
    assert after["manifest.json"] != before["manifest.json"]


def test_damaged_files_are_skipped_on_request(tmp_path: Path, run: Run) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    put(np.nan, key="action")(tmp_path)
    (tmp_path / "sequence/r/shard-00002.hdf5").write_bytes(b"")
    code, output, errors = run("--config", write_config(tmp_path), "--local", "--on_error", "skip")
    assert code == 0
    assert "damaged files: 1; planning again without them\n" in errors  # the other was found before the first plan
    assert "skipped files: 2\n" in output
    assert re.search(r"skipped: .*/shard-00001\.hdf5: .*action holds nan in column 1 at episode 2, step 3", output)
    assert re.search(r"skipped: .*/shard-00002\.hdf5: .*truncated, corrupt", output)
    assert "doctor: 0 errors" in output


def test_file_names_that_are_no_text(tmp_path: Path, run: Run) -> None:
    recording = write_recording(tmp_path / "sequence/r", make_episodes(LENGTHS))
    (recording / "shard-00001.hdf5").write_bytes(b"")
    for path, name in zip(sorted(recording.iterdir()), (b"m\xe4rz.hdf5", b"\xe4.hdf5"), strict=False):
        path.rename(recording / os.fsdecode(name))
    code, output, errors = run("--config", write_config(tmp_path), "--local", "--on_error", "skip")
    assert code == 0, errors
    assert r"/sequence/r/\udce4.hdf5: " in output
    assert "doctor: 0 errors" in output
    manifest = json.loads((tmp_path / "inverse_dynamics/r/manifest.json").read_text())
    assert [os.fsencode(path) for path in manifest["skipped_files"]] == [
        os.fsencode(recording / os.fsdecode(b"\xe4.hdf5"))
    ]
    assert os.fsdecode(b"m\xe4rz.hdf5") in {source["name"] for source in manifest["sources"]}


# Processes that end in the middle


def test_disk_full(tmp_path: Path, repository: Path) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes([40] * 20))
    config, folder = write_config(tmp_path), tmp_path / "inverse_dynamics/r"

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    result = finish(start(repository, "--config", config, preexec_fn=limit_file_size))
    assert_error(result, r"cannot write .*/train/part-00000\.h5: .*File too large.*; free some space")
    assert sorted(contents(folder)) == [".progress/plan.json"]
    assert finish(start(repository, "--config", config))[0] == 0
    assert "manifest.json" in contents(folder)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_continues(tmp_path: Path, repository: Path, run: Run, stop: signal.Signals) -> None:
    write_recording(tmp_path / "sequence/r", make_episodes([20] * 150), episodes_per_shard=50)
    config = write_config(tmp_path, part_size_mb=1e-6)  # a part for each episode
    folder = tmp_path / "inverse_dynamics/r"
    process = start(repository, "--config", config)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("train/part-*.h5"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(stop)
    code, _, errors = finish(process)
    assert code == (-signal.SIGKILL if stop == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    stopped = contents(folder)
    parts = {name: content for name, content in stopped.items() if re.fullmatch(r"\w+/part-\d+\.h5", name)}
    assert 10 <= len(parts) < 150
    assert "manifest.json" not in stopped
    assert_error(run("--config", config, "--local", "--set", "gap=2"), "unfinished dataset with another plan")
    assert contents(folder) == stopped

    assert run("--config", config, "--local")[0] == 0
    assert run("--config", config, "--local", "--set", f"output_path={tmp_path}/whole")[0] == 0
    assert contents(folder) == contents(tmp_path / "whole")
    assert parts.items() <= contents(folder).items()
