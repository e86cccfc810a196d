"""A gloo process group of processes on this machine, without Ray: seconds instead of a quarter of a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from invdyn.training.run_config import RunConfig

TIMEOUT_S = 120


def train_in_group(configs: dict[str, RunConfig], folder: Path, world_size: int) -> dict[str, list[dict[str, Any]]]:
    """Train runs one after another on the same `world_size` processes; return the outcome of each rank by run."""
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(config.to_yaml())
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.training.group", str(folder), ",".join(configs), str(world_size)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment, cwd=root) for rank in range(world_size)]
    try:
        assert [rank.wait(TIMEOUT_S) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
    return {
        name: [json.loads((folder / name / f"outcome-{rank}.json").read_text()) for rank in range(world_size)]
        for name in configs
    }


def main(folder: Path, names: list[str], world_size: int, rank: int) -> None:
    """Be one rank."""
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", world_size=world_size, rank=rank)
    for name in names:
        outcome = train_one(RunConfig.load(folder / name), world_size, rank)
        (folder / name / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    torch.distributed.destroy_process_group()


def train_one(config: RunConfig, world_size: int, rank: int) -> dict[str, Any]:
    import torch

    from invdyn.errors import InvdynError
    from invdyn.training.distributed import Agreement, join_group
    from invdyn.training.loop import train_loop

    worker = join_group(torch.device("cpu"), rank, world_size, world_size)
    try:
        return {"metrics": train_loop(config, worker)}
    except InvdynError as error:
        assert isinstance(worker.agree, Agreement)
        return {"kind": type(error).__name__, "error": str(error), "agreed": worker.agree.holds_for(error)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4]))
