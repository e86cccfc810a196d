"""Three hosts that share no folder: the whole pipeline on an S3 server, and what is not shared is refused at the start.

Each host offers one CPU: so whatever needs two CPUs needs two hosts. Only the driver's shell knows of the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.cluster.lab import LAPTOP, Lab, missing, open_lab

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
HOSTS = {"head": "10.77.0.11", "w1": "10.77.0.12", "w2": "10.77.0.13"}
SERVER = f"http://{HOSTS['w2']}:5000"
SSH = "ssh -o StrictHostKeyChecking=no"
PATHS = "export PYTHONPATH=~/invdyn:~/invdyn/experiments"
ACCESS = (
    f"export AWS_ENDPOINT_URL={SERVER} AWS_ACCESS_KEY_ID=me AWS_SECRET_ACCESS_KEY=mine AWS_DEFAULT_REGION=us-west-2 "
    "WANDB_MODE=disabled"
)
DATASET = "configs/dataset/pendulum_integrable.yaml"
MODEL = "configs/inverse_dynamics/mlp.yaml"


@pytest.fixture(scope="module")
def lab(repository) -> Iterator[Lab]:
    with open_lab(repository, HOSTS, PATHS) as lab:
        for host, address in HOSTS.items():
            lab.run(host, "umount /mnt/shared && mkdir ~/.ray && echo the token > ~/.ray/auth_token")
            lab.run(LAPTOP, f"rsync -a --mkpath -e '{SSH}' invdyn experiments configs {address}:invdyn/")
        lab.run("w2", "setsid python -m moto.server -H 0.0.0.0 -p 5000 >/tmp/server.log 2>&1 &")
        lab.run("head", "ray start --head --port=6379 --num-cpus=1")
        for host in ("w1", "w2"):
            lab.run(host, f"ray start --address={HOSTS['head']}:6379 --num-cpus=1")
        lab.run("head", f"until curl -s -X PUT {SERVER}/bucket; do sleep 0.2; done")
        yield lab


def on_head(lab: Lab, command: str, otherwise: str = "exit 1") -> str:
    said = lab.run("head", f"{ACCESS}; cd ~/invdyn && python experiments/{command} --address auto || {otherwise}")
    print(said)
    return said


@pytest.fixture(scope="module")
def dataset(lab) -> str:
    """Record and extract on the server; return the flag that says where."""
    where = "--storage s3://bucket"
    said = on_head(lab, f"collect.py --config {DATASET} --smoke {where}")
    assert "3 node(s), 3 CPUs" in said
    assert "2 shards in s3://bucket/data/sequence/pendulum_integrable" in said
    said = on_head(lab, f"create_dataset.py --config {DATASET} --smoke {where}")
    assert "1,000 transitions" in said
    return where


def test_everything_on_s3(lab, dataset):
    flags = f"--dataset_config {DATASET} --model_config {MODEL} --num_epochs 2 --num_workers 2"
    said = on_head(lab, f"train.py {flags} --run_dir s3://bucket/runs/two {dataset}")
    assert "epoch 2/2" in said
    said = on_head(lab, f"sweep.py --smoke --output s3://bucket/runs/sweep {dataset}")
    assert "best model: s3://bucket/runs/sweep/best" in said
    listing = lab.run("head", f"curl -s {SERVER}/bucket?prefix=runs")
    for name in ("two/checkpoints", "two/metrics.csv", "sweep/best", "sweep/results.csv"):
        assert f"<Key>runs/{name}" in listing, listing
    for host in HOSTS:
        assert lab.run(host, "ls ~/invdyn").split() == ["configs", "experiments", "invdyn"]


@pytest.mark.parametrize(
    "command",
    [
        f"collect.py --config {DATASET} --smoke --storage ~/mine",
        f"train.py --dataset_config {DATASET} --model_config {MODEL} --storage s3://bucket --run_dir ~/mine/run",
    ],
)
def test_what_is_not_shared_is_refused(lab, dataset, command):
    said = on_head(lab, command, otherwise="echo exit code $?")
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    for name in ("w1", "w2"):
        folder = r"/home/root/mine/\S+"
        assert re.search(rf"on node {name} \({HOSTS[name]}\): {folder} is not the driver's folder", error), error
    assert "exit code 2" in said
    assert lab.run("head", "find ~/mine -type f -not -name '.*'") == ""
