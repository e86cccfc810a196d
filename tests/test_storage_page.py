"""The commands of docs/storage.md run as they stand there, against a real S3 server."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from invdyn import storage
from invdyn.transitions.store import TransitionStore
from tests.sequences.recordings import make_episodes, write_recording

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/storage.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (python experiments/.*)$", PAGE, flags=re.MULTILINE)


def test_the_commands_run_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    write_recording(tmp_path / "pendulum", make_episodes([40] * 12, states_after=1))
    folder = f"{s3_bucket}/{tmp_path.name}"
    for shard in sorted((tmp_path / "pendulum").iterdir()):
        with storage.replacing(f"{folder}/sequence/pendulum/{shard.name}") as temporary:
            Path(temporary).write_bytes(shard.read_bytes())
    (tmp_path / "pendulum.yaml").write_text(f"name: pendulum\nbuffer_path: {folder}/sequence/pendulum\n")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert [shlex.split(command)[1].rpartition("/")[2] for command in COMMANDS] == [
        "create_dataset.py",
        "doctor.py",
        "train.py",
    ]
    for command in COMMANDS:
        script, *flags = shlex.split(command)[1:]
        extra = {"create_dataset.py": ["--local"], "train.py": ["--local", "--smoke"]}
        done = subprocess.run(
            [sys.executable, script, *flags, *extra.get(Path(script).name, [])],
            cwd=tmp_path,
            env={**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
    assert TransitionStore(f"{folder}/inverse_dynamics/pendulum").manifest["num_rows"] == 12 * 40
    assert list((tmp_path / "runs").rglob("model.safetensors"))


def test_what_cannot_lie_on_s3_is_refused(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "experiments/train.py"),
        "--dataset_config",
        "d.yaml",
        "--model_config",
        "m.yaml",
    ]
    done = subprocess.run(
        [*command, "--run_dir", "s3://bucket/run"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
