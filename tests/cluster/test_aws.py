"""cluster.yaml itself on moto's EC2 and IAM, whose instances are hosts: GPU workers come, are lost, replaced, and go.

What the user fills in is filled in, and workers are idle for a shorter time before they go. The hosts' image holds a
mounted /mnt/shared, and the variable that says where AWS is. Their GPUs are only spoken of: what runs there finds none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ec2 import ENVIRONMENT, Ec2
from tests.cluster.lab import LAPTOP, Lab, missing, open_lab
from tests.cluster.laptop import Laptop, in_background, wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
YAML = "/tmp/cluster.yaml"
DATASET = "configs/dataset/pendulum_integrable.yaml"
MODEL = "configs/inverse_dynamics/mlp.yaml"
NUM_EPOCHS = 2000


def shipped_config(repository: Path, ec2: Ec2) -> str:
    text = (repository / "cluster.yaml").read_text()
    changes = {
        "ami-00000000000000000": ec2.image,
        "sg-00000000000000000": ec2.security_group,
        "idle_timeout_minutes: 10": "idle_timeout_minutes: 0.25",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def lab(repository) -> Iterator[Lab]:
    with open_lab(repository, {}, ENVIRONMENT) as lab:
        yield lab


def test_from_ray_up_to_ray_down(lab, repository):
    ec2 = Ec2(lab, login="ubuntu")
    laptop = Laptop(lab, YAML)
    laptop.write_yaml(shipped_config(repository, ec2))
    up = in_background(laptop, f"ray up {YAML} --yes --no-config-cache")
    where = "--smoke --local --storage /tmp/mine"
    laptop(f"python experiments/collect.py --config {DATASET} {where}")
    laptop(f"python experiments/create_dataset.py --config {DATASET} {where}")
    up.result()
    (head,) = ec2.running()
    assert ec2.running("head") == [head]
    laptop(f"ray rsync-up {YAML} /tmp/mine/data/ /mnt/shared/data/")

    sweep = "--smoke --output runs/sweep --address auto --wandb disabled"
    said = laptop.submit("sweep.py", sweep)
    assert "1 node(s), 0 CPUs, 0 GPUs (may grow to 16 CPUs, 4 GPUs); uses 1 CPU and 0.25 GPU per trial" in said
    assert "best model: " in said
    (lost,) = ec2.running("gpu_worker")
    spot = ec2.instances[lost]
    assert (spot["InstanceType"], spot["InstanceLifecycle"]) == ("g5.xlarge", "spot")
    assert len(laptop.busy_actors("GPU")) >= 1

    flags = f"--dataset_config {DATASET} --model_config {MODEL} --num_epochs {NUM_EPOCHS} --device cpu --num_workers 2"
    job = in_background(laptop.submit, "train.py", f"{flags} --run_dir runs/spot --address auto --wandb disabled")
    saved = "ls /mnt/shared/runs/spot/checkpoints 2>/dev/null || true"
    wait_for("a checkpoint", lambda: lab.run(ec2.host(head), saved), within_s=300, job=job)
    ec2.take_away(lost)
    wait_for("the lost worker to be noticed", lambda: lost not in ec2.running(), within_s=60)
    wait_for("another worker", lambda: ec2.running("gpu_worker"), within_s=300, job=job)
    log = "cat /mnt/shared/runs/spot/train.log"
    wait_for("the run to go on", lambda: "continuing from" in lab.run(ec2.host(head), log), within_s=300, job=job)
    said = job.result()
    assert re.search(rf"lost on node {ec2.host(lost)}.*: restarted on 2 worker\(s\) from step", said), said
    assert f"epoch {NUM_EPOCHS}/{NUM_EPOCHS}" in said

    wait_for("the idle worker to go", lambda: ec2.running() == [head], within_s=300)
    laptop(f"ray down {YAML} --yes")
    assert ec2.running() == []
    wait_for("the hosts to end", lambda: set(lab.logins) == {LAPTOP, "cloud"}, within_s=60)
