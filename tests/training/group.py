"""A gloo process group of processes on this machine, without Ray: seconds instead of a quarter of a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from invdyn.training.run_config import RunConfig

TIMEOUT_S = 60


def train_in_group(config: RunConfig, folder: Path, world_size: int) -> list[dict[str, Any]]:
    """Train a run on `world_size` processes and return the outcome of each rank."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.training.group", str(folder), str(world_size)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment, cwd=root) for rank in range(world_size)]
    try:
        assert [rank.wait(TIMEOUT_S) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(world_size)]


def main(folder: Path, world_size: int, rank: int) -> None:
    """Be one rank."""
    import torch

    from invdyn.errors import InvdynError
    from invdyn.training.distributed import Agreement, join_group
    from invdyn.training.loop import train_loop

    config = RunConfig.load(folder)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", world_size=world_size, rank=rank)
    worker = join_group(torch.device("cpu"), rank, world_size, world_size)
    try:
        outcome: dict[str, Any] = {"metrics": train_loop(config, worker)}
    except InvdynError as error:
        assert isinstance(worker.agree, Agreement)
        outcome = {"kind": type(error).__name__, "error": str(error), "agreed": worker.agree.holds_for(error)}
    (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
