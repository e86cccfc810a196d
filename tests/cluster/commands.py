"""Run commands of the project one after another in one process, so that they share its connection to Ray.

python tests/cluster/commands.py 'collect.py --config ... --address auto' 'train.py ...'

The last line says, as JSON, which nodes of the cluster did the work.
"""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run them; the first that fails ends with its exit code."""
    import common  # of the project's experiments/, which is on the path

    for command in sys.argv[1:]:
        print(f"$ {command}", flush=True)
        sys.argv = shlex.split(command)
        runpy.run_path(str(Path(common.__file__).parent / sys.argv[0]), run_name="__main__")
    if "ray" in sys.modules:
        print(json.dumps(nodes_at_work()))


def nodes_at_work() -> dict[str, Any]:
    """Return the nodes of all actors that reserved a CPU, by class (training workers, trials), and of tasks by name."""
    from ray.util.state import list_actors, list_tasks

    actors: dict[str, list[str]] = {}
    for actor in list_actors(detail=True, limit=1000):
        if any(name.startswith("CPU") and amount for name, amount in (actor.required_resources or {}).items()):
            actors.setdefault(actor.class_name, []).append(actor.node_id)
    tasks: dict[str, list[str]] = {}
    for task in list_tasks(detail=True, limit=10_000, filters=[("type", "=", "NORMAL_TASK")]):
        if task.state == "FINISHED":
            tasks.setdefault(task.name, []).append(task.node_id)
    return {"actors": actors, "tasks": {name: sorted(set(nodes)) for name, nodes in tasks.items()}}


if __name__ == "__main__":
    main()
