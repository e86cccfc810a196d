"""A real `ray start --head`, as the shipped files start it, answers only to clients that hold the token.

It runs in network, PID and mount namespaces of its own: no other Ray on this machine is seen, and nothing outlives it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TOKEN = "0123456789abcdef0123456789abcdef"
# What a client runs: the CLI, the driver of every command, and the dashboard's HTTP (which `ray job` uses).
CLIENT = """
import json, os, sys, urllib.error, urllib.request
from ray._raylet import GcsClient

def gcs():
    try:
        return len(GcsClient(address="127.0.0.1:6379").get_all_node_info())
    except Exception as error:
        return type(error).__name__

def http():
    token = os.environ.get("RAY_AUTH_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8265/api/jobs/", headers=headers)).status
    except urllib.error.HTTPError as error:
        return error.code

print(json.dumps([gcs(), http()]))
"""
RAN = "ran with"


def in_namespaces(script: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash in namespaces that end with it; Ray's temporary folder and shared memory are its own."""
    prelude = (
        "mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && mount -t tmpfs tmpfs /dev/shm && ip link set lo up; "
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n"
    )
    kept = {"PATH": os.environ["PATH"], "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    unshare = ["unshare", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.run(
        [*unshare, "bash", "-c", prelude + script], env={**kept, **environment}, capture_output=True, text=True
    )


@pytest.fixture(autouse=True)
def _can_make_namespaces() -> None:
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "ip"))):
        pytest.skip("needs root, unshare and ip (iproute2) for namespaces of its own")


@pytest.mark.cluster
def test_clients_without_the_token_are_refused(repository, tmp_path):
    config = yaml.safe_load((repository / "cluster.yaml").read_text())
    start = config["head_start_ray_commands"][-1].replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    client = f"python -c {shlex.quote(CLIENT)}"
    done = in_namespaces(
        f"{start} --num-cpus=1 --object-store-memory=100000000 >{tmp_path}/head.log 2>&1 || exit 9\n"
        f"unset RAY_AUTH_MODE; HOME={tmp_path}/nobody {client}\n"
        f"export RAY_AUTH_MODE=token; RAY_AUTH_TOKEN=wrong-wrong-wrong-wrong {client}\n"
        f"RAY_AUTH_TOKEN={TOKEN} {client}\n",
        tmp_path,
    )
    assert done.returncode == 0, (tmp_path / "head.log").read_text()
    without, wrong, right = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert without == ["AuthenticationError", 401]
    assert wrong == ["AuthenticationError", 403]
    assert right == [1, 200]


@pytest.mark.cluster
def test_slurm_script_runs_a_command_on_a_real_ray(repository, tmp_path):
    """One node, so srun can simply run what it is given; Ray, the token and the command are real."""
    commands = tmp_path / "bin"
    commands.mkdir()
    srun = 'while [[ $1 == --* ]]; do shift; done; case "$1" in hostname) echo 127.0.0.1;; *) exec "$@";; esac'
    for name, body in {"srun": srun, "scontrol": "echo here"}.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, ray\n"
        "ray.init(address=sys.argv[2], log_to_driver=False)\n"
        f"print({RAN!r}, ray.cluster_resources()['CPU'], 'CPUs, auth', os.environ['RAY_AUTH_MODE'])\n"
        "sys.exit(7)\n"
    )
    done = in_namespaces(
        f"export PATH={commands}:$PATH; bash {repository}/configs/cluster/slurm.sh {script}",
        tmp_path,
        SLURM_JOB_ID="3",
        SLURM_JOB_NODELIST="here",
        SLURM_CPUS_PER_TASK="3",
        SLURM_SUBMIT_DIR=str(tmp_path),
    )
    assert f"{RAN} 3.0 CPUs, auth token" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 7  # the job fails when the command fails
