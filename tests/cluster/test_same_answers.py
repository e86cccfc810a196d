"""Wherever the pipeline runs, it gives the same answers: in one process, with one worker, with two, on two hosts.

Every place has its own copy of everything, from the recording on.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.cluster.lab import LAPTOP, Lab, missing, open_lab

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
HOSTS = {"head": "10.77.0.11", "w1": "10.77.0.12"}
PROJECT = "/mnt/shared/project"
BASHRC = f"export PYTHONPATH={PROJECT}:{PROJECT}/experiments OMP_NUM_THREADS=1"
DATASET = "configs/dataset/pendulum_integrable.yaml"
MODEL = "configs/inverse_dynamics/pendulum_flow.yaml"
RECORDING = "--set collect.num_episodes=400 --set collect.episodes_per_shard=50 --set collect.max_episode_steps=50"
MEASURED = {"elapsed_s", "steps_per_s", "us_per_action", "train_s", "run_dir"}
ROUNDING = 1e-4


def pipeline(place: str, flags: str) -> str:
    """Return the pipeline's commands, as arguments of commands.py, with all they write below /mnt/shared/PLACE."""
    where = f"--storage /mnt/shared/{place} --wandb disabled {flags}"
    commands = [
        f"collect.py --config {DATASET} {RECORDING} {where}",
        f"create_dataset.py --config {DATASET} --max_samples 5000 --set part_size_mb=0.02 {where}",
        f"train.py --dataset_config {DATASET} --model_config {MODEL} --num_epochs 4 --run_dir runs/flow {where}",
        f"sweep.py --set num_trials=3 --set num_epochs=2 --set asha=null --output runs/sweep {where}",
    ]
    return shlex.join(command.replace(" runs/", f" /mnt/shared/{place}/runs/") for command in commands)


class Answers(NamedTuple):
    """What a place gave.

    Attributes:
        files: checksum of each file of the recording and of the dataset, by its path.
        losses: rows of the training run's metrics, without times.
        results: rows of the sweep's results, best first, without times.
    """

    files: dict[str, str]
    losses: list[dict[str, float]]
    results: list[dict[str, str]]


def read_answers(lab: Lab, place: str) -> Answers:
    """Read them on a host."""
    listing = lab.run("head", f"cd /mnt/shared/{place} && find data -name '*.h*5' | sort | xargs sha256sum")
    sums = dict(reversed(line.split()) for line in listing.splitlines())
    losses = rows_of(lab.run("head", f"cat /mnt/shared/{place}/runs/flow/metrics.csv"))
    results = rows_of(lab.run("head", f"cat /mnt/shared/{place}/runs/sweep/results.csv"))
    return Answers(sums, [{name: float(value) for name, value in row.items() if value} for row in losses], results)


def rows_of(text: str) -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(text))
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def lab(repository) -> Iterator[Lab]:
    with open_lab(repository, HOSTS, BASHRC) as lab:
        copied = " ".join(str(repository / name) for name in ("invdyn", "experiments", "configs"))
        ssh = "ssh -o StrictHostKeyChecking=no -o LogLevel=ERROR"
        lab.run(LAPTOP, f"rsync -a --mkpath -e '{ssh}' {copied} {HOSTS['head']}:{PROJECT}/")
        yield lab


@pytest.fixture(scope="module")
def places(lab, repository) -> dict[str, Any]:
    """Run the pipeline everywhere; return which nodes were at work where there was Ray."""

    def run(host: str, *pipelines: str) -> dict[str, Any]:
        said = lab.run(host, f"cd {PROJECT} && python {repository}/tests/cluster/commands.py {' '.join(pipelines)}")
        print(said)
        last = next((line for line in reversed(said.splitlines()) if line.startswith('{"actors"')), "{}")
        found: dict[str, Any] = json.loads(last)
        return found

    alone = run("head", pipeline("local", "--local"))
    # Each of these starts a Ray of its own, of as many nodes as it says.
    one_host = run("w1", pipeline("two_workers", "--num_workers 2"), pipeline("one_worker", "--num_workers 1"))
    lab.run("head", "ray get-auth-token --generate && cp ~/.ray/auth_token /mnt/shared/token")
    lab.run("w1", "cp /mnt/shared/token ~/.ray/auth_token")
    lab.run("head", "ray start --head --port=6379 --num-cpus=1")
    lab.run("w1", f"ray start --address={HOSTS['head']}:6379 --num-cpus=1")
    two_hosts = run("head", pipeline("two_hosts", "--num_workers 2 --address auto"))
    return {"local": alone, "one_host": one_host, "two_hosts": two_hosts}


@pytest.fixture(scope="module")
def local(lab, places) -> Answers:
    return read_answers(lab, "local")


def test_the_work_was_done_where_it_should(places):
    """A node has one CPU where there are two: two workers, or trials, at a time are on two hosts."""
    assert places["local"] == {}
    assert len(set().union(*places["one_host"]["actors"].values())) == 1
    assert set(map(len, places["one_host"]["tasks"].values())) == {1}
    (workers,) = (nodes for name, nodes in places["two_hosts"]["actors"].items() if "TrainWorker" in name)
    assert len(workers) == len(set(workers)) == 2
    assert len(set().union(*places["two_hosts"]["actors"].values())) == 2
    at_work = places["two_hosts"]["tasks"]
    assert len(at_work["record_shard"]) == len(at_work["Map(run)"]) == 2


@pytest.mark.parametrize("place", ["one_worker", "two_workers", "two_hosts"])
def test_same_recording_and_dataset_to_the_byte(lab, places, local, place):
    assert len(local.files) > 6
    assert read_answers(lab, place).files == local.files


@pytest.mark.parametrize("place", ["one_worker", "two_workers", "two_hosts"])
def test_same_losses_at_the_same_global_batch(lab, places, local, place):
    """Two workers add up their gradients in another order than one."""
    losses = read_answers(lab, place).losses
    assert len(losses) == 4
    for row, expected in zip(losses, local.losses, strict=True):
        assert row == (expected if place == "one_worker" else pytest.approx(expected, rel=ROUNDING))


@pytest.mark.parametrize("place", ["one_worker", "two_workers", "two_hosts"])
def test_same_results_of_a_sweep(lab, places, local, place):
    results = read_answers(lab, place).results
    assert results[0] == local.results[0]
    assert results == local.results
    assert {row["status"] for row in results} == {"finished"}
