"""configs/cluster/local.yaml on three hosts over SSH: from `ray up` to `ray down`, and every command of the pipeline.

Only addresses and user are changed in the file, and each host is told to offer one CPU: so whatever needs two CPUs
needs two hosts.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, missing, open_lab
from tests.cluster.laptop import Laptop, wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
HOSTS = {"head": "10.77.0.11", "w1": "10.77.0.12", "w2": "10.77.0.13"}
YAML = "/tmp/local.yaml"
# A minute otherwise: how long a worker waits for a head that is gone, before it ends too.
IMPATIENT = "export RAY_gcs_rpc_server_reconnect_timeout_s=5"
DATASET = "configs/dataset/pendulum_integrable.yaml"
RUN = f"--dataset_config {DATASET} --model_config configs/inverse_dynamics/mlp.yaml"
WAIT = """
import ray, sys, time
ray.init(address="auto", log_to_driver=False)
end = time.time() + 900
while sum(node["Alive"] for node in ray.nodes()) < 3 and time.time() < end:
    time.sleep(1)
print("hosts", sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]))
"""


def shipped_config(repository: Path) -> str:
    text = (repository / "configs" / "cluster" / "local.yaml").read_text()
    changes = {
        "192.0.2.11": HOSTS["head"],
        "192.0.2.12": HOSTS["w1"],
        "192.0.2.13": HOSTS["w2"],
        "ssh_user: ubuntu": "ssh_user: root",
        "ray start ": "ray start --num-cpus=1 ",
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def lab(repository) -> Iterator[Lab]:
    with open_lab(repository, HOSTS, IMPATIENT) as lab:
        yield lab


def test_from_ray_up_to_ray_down(lab, repository):
    laptop = Laptop(lab, YAML)
    laptop.write_yaml(shipped_config(repository))
    laptop(f"ray up {YAML} --yes --no-config-cache")
    assert f"hosts {sorted(HOSTS.values())}" in laptop.on_head(f"python -c {shlex.quote(WAIT)}")
    for host in HOSTS:  # file mounts, on every host
        lab.run(host, "test -f ~/invdyn/invdyn/__init__.py && test $(stat -c %a ~/.ray/auth_token) = 600")
        assert "/home/root/invdyn/invdyn" in lab.run(
            host, "cd / && ~/invdyn-venv/bin/python -c 'import invdyn; print(invdyn)'"
        )
    # What it says is some seconds old.
    wait_for("ray status", lambda: re.search(r"0\.0/3\.0 CPU", laptop.on_head("ray status")), within_s=120)

    laptop(f"mkdir /tmp/up && echo from the laptop > /tmp/up/note && ray rsync-up {YAML} /tmp/up/ /mnt/shared/data/up/")
    assert lab.run("w2", "cat /mnt/shared/data/up/note") == "from the laptop\n"

    said = laptop.submit("collect.py", f"--config {DATASET} --smoke --address auto")
    assert "10.77.0.11:6379, 3 node(s), 3 CPUs, 0 GPUs; uses at most 3 tasks at a time" in said
    assert "recorded 128 episodes" in said

    job = f"cd ~/invdyn && python experiments/create_dataset.py --config {DATASET} --smoke --address auto"
    said = laptop(
        f"setsid ray dashboard {YAML} >/tmp/dashboard.log 2>&1 & "
        "until curl -s -o /dev/null http://localhost:8265; do sleep 0.5; done; "
        "RAY_AUTH_MODE=disabled ray job list --address http://localhost:8265 >/tmp/refused 2>&1 && echo let in; "
        f"ray job submit --address http://localhost:8265 -- bash -c {shlex.quote(job)}"
    )
    assert "let in" not in said
    assert "succeeded" in said
    assert "1,000 transitions" in said

    said = laptop.submit("train.py", f"{RUN} --num_epochs 2 --num_workers 2 --run_dir runs/two --address auto")
    assert "uses 2 worker(s) with 1 CPU each" in said
    assert "epoch 2/2" in said
    workers = laptop.busy_actors("CPU")
    assert len(workers) == len(set(workers.values())) == 2  # on two hosts
    assert lab.run("w1", "wc -l < /mnt/shared/runs/two/metrics.csv").strip() == "3"

    said = laptop.submit("sweep.py", "--smoke --address auto --output runs/sweep")
    assert "1 CPU per trial" in said
    assert "best model: " in said
    trials = {actor: node for actor, node in laptop.busy_actors("CPU").items() if actor not in workers}
    assert len(set(trials.values())) == 2, trials
    assert "model.safetensors" in lab.run("head", "ls -R /mnt/shared/runs/sweep/best")

    laptop(f"ray down {YAML} --yes")
    # Workers leave on their own: see IMPATIENT.
    processes = "pgrep 'raylet|gcs_' || true"
    wait_for("Ray to end", lambda: not any(lab.run(host, processes) for host in HOSTS), within_s=300)
