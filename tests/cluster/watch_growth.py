"""Run a command on the cluster of this machine; wait until the nodes that it needed have gone.

python tests/cluster/watch_growth.py WITHIN_S COMMAND...

The last line says, as JSON, each number of nodes that was seen, in turn, and the resources of the largest cluster.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import ray


def main(within_s: float, command: list[str]) -> None:
    """Run it, and print its output and what was seen."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    seen: list[int] = []
    largest: dict[str, Any] = {}
    running = subprocess.Popen(command)
    ended_at = None
    while ended_at is None or (seen[-1] > 1 and time.monotonic() < ended_at + within_s):
        num_nodes = sum(node["Alive"] for node in ray.nodes())
        if not seen or num_nodes != seen[-1]:
            seen.append(num_nodes)
            if num_nodes == max(seen):
                largest = ray.cluster_resources()
        if ended_at is None and running.poll() is not None:
            ended_at = time.monotonic()
        time.sleep(0.2)
    print(json.dumps({"exit code": running.returncode, "nodes": seen, "largest": largest}))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
