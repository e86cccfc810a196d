"""What a user types on the laptop of the lab, and waiting for what it leads to."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tests.cluster.lab import LAPTOP, Lab


class Laptop:
    """What its user types, with the seconds that each command takes.

    Args:
        lab: the laptop's.
        yaml: path of the cluster's file on it.
    """

    def __init__(self, lab: Lab, yaml: str):
        self.lab, self.yaml = lab, yaml

    def __call__(self, command: str) -> str:
        started = time.monotonic()
        # Ray asks SSH for a terminal, which ends lines in its own way.
        said = self.lab.run(LAPTOP, command, timeout_s=1800).replace("\r", "")
        print(f"{time.monotonic() - started:6.1f} s  {command[:120]!r}", flush=True)
        return said

    def write_yaml(self, text: str) -> None:
        """Write the cluster's file, and make the token that it mounts."""
        self.lab.run(LAPTOP, f"printf %s {shlex.quote(text)} > {self.yaml}")
        self.lab.run(LAPTOP, "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")

    def on_head(self, command: str) -> str:
        """Run a command on the head."""
        return self(f"ray exec {self.yaml} {shlex.quote(command)}")

    def submit(self, script: str, flags: str) -> str:
        """Run one of the project's scripts on the head."""
        return self(f"ray submit {self.yaml} experiments/{script} -- {flags}")

    def busy_actors(self, resource: str) -> dict[str, str]:
        """Return the node of each actor that has reserved a resource since `ray up`: training workers and trials."""
        said = self.on_head("ray list actors --detail --format json --limit 1000 2>/dev/null")
        actors = json.loads(next(line for line in said.splitlines() if line.startswith('[{"actor_id"')))
        return {
            actor["actor_id"]: actor["node_id"]
            for actor in actors
            if any(name.startswith(resource) and amount for name, amount in (actor["required_resources"] or {}).items())
        }


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call a function beside what follows."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future


def wait_for(what: str, condition: Callable[[], Any], *, within_s: float, job: Future[Any] | None = None) -> Any:
    """Return what a condition gives as soon as it gives anything.

    Args:
        what: is waited for, in words.
        condition: is asked once a second.
        within_s: seconds.
        job: that leads to it; what it raises is raised.

    Raises:
        AssertionError: when it takes too long, or the job ends before.
    """
    started = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() < started + within_s, f"{what}: not within {within_s:.0f} s"
        if job is not None and job.done():
            raise AssertionError(f"{what}: not before the job's end\n{job.result()}")
        time.sleep(1)
    print(f"{time.monotonic() - started:6.1f} s  waited for {what}", flush=True)
    return found
