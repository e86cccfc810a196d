"""The commands of docs/storage.md run as they stand there, against a real S3 server."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from invdyn import storage
from invdyn.training.checkpoint import load_checkpoint
from invdyn.transitions.store import TransitionStore
from tests.sequences.recordings import make_episodes, write_recording

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/storage.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (python experiments/.*)$", PAGE, flags=re.MULTILINE)


def test_the_commands_run_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    write_recording(tmp_path / "pendulum", make_episodes([40] * 12, states_after=1))
    folder = f"{s3_bucket}/{tmp_path.name}"
    for shard in sorted((tmp_path / "pendulum").iterdir()):
        with storage.replacing(f"{folder}/data/sequence/pendulum/{shard.name}") as temporary:
            Path(temporary).write_bytes(shard.read_bytes())
    config = re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert config is not None
    (tmp_path / "pendulum.yaml").write_text(config[1].replace("s3://my-bucket", folder))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert [shlex.split(command)[1].rpartition("/")[2] for command in COMMANDS] == [
        "create_dataset.py",
        "train.py",
        "evaluate.py",
    ]
    for command in COMMANDS:
        script, *flags = shlex.split(command.replace("s3://my-bucket", folder))[1:]
        extra = {
            "create_dataset.py": ["--local"],
            "train.py": ["--local", "--smoke"],
            "evaluate.py": ["--smoke", "--baselines", "linear", "--num_samples", "2"],
        }
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
    assert TransitionStore(f"{folder}/data/inverse_dynamics/pendulum").manifest["num_rows"] == 12 * 40
    assert load_checkpoint(f"{folder}/runs/first").config.run_dir == f"{folder}/runs/first"
    assert storage.is_file(f"{folder}/runs/first/evaluation/report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "experiments", "pendulum", "pendulum.yaml"]
