"""What clusters do to long jobs, on four hosts: each job ends as if nothing had happened, and its log says what did.

The driver runs on the head, which offers no CPU; work is done on three hosts of one CPU each, so that
training can lose one. Ray is told to miss a host after seconds in place of a minute.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from invdyn.training.attempt import WRITER_FILE
from invdyn.training.checkpoint import WEIGHTS_FILE, list_checkpoints
from tests.cluster.lab import Lab, missing, open_lab
from tests.sequences.recordings import write_recording as write_shards
from tests.training.runs import FLOW, RECIPE, TIMES, write_recording

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
HOSTS = {"head": "10.77.0.11", "w1": "10.77.0.12", "w2": "10.77.0.13", "w3": "10.77.0.14"}
WORKERS = ("w1", "w2", "w3")
HOME = "/mnt/shared/project"
BASHRC = (
    f"export PYTHONPATH={HOME} RAY_AUTH_MODE=disabled OMP_NUM_THREADS=1 WANDB_MODE=disabled "
    "RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=2500 "
    "RAY_health_check_failure_threshold=3"
)
START = "ray start {} >/tmp/start.log 2>&1 </dev/null || {{ cat /tmp/start.log; exit 1; }}"
TRAIN = "--dataset_config tiny.yaml --model_config model.yaml --num_epochs 200 --num_workers 2"
MEASURED = ("train_s", "us_per_action", "energy_score")


class Cluster:
    """A lab with Ray on it, and a folder that all its hosts share.

    Attributes:
        shared: that folder, as this machine sees it.
    """

    def __init__(self, lab: Lab):
        self.lab = lab
        self.shared = Path(f"/proc/{lab.inside}/root/mnt/shared")
        self.project = self.shared / "project"

    def start_ray(self) -> None:
        """Start the head and all workers."""
        self.lab.run("head", START.format(f"--head --port=6379 --num-cpus=0 --node-ip-address={HOSTS['head']}"))
        for host in WORKERS:
            self.join(host)

    def join(self, host: str) -> None:
        """Start Ray on a worker, after whatever is left of it there."""
        flags = f"--address={HOSTS['head']}:6379 --num-cpus=1 --node-ip-address={HOSTS[host]}"
        self.lab.run(host, f"ray stop --force; {START.format(flags)}")

    def command(self, script: str, flags: str) -> str:
        return f"cd {HOME} && exec python experiments/{script} {flags} --address {HOSTS['head']}:6379"

    def run(self, script: str, flags: str) -> str:
        """Run a command of the project on the head; return what it printed."""
        return self.lab.run("head", self.command(script, flags))

    def start(self, script: str, flags: str) -> subprocess.Popen[str]:
        """Start one, and go on."""
        return subprocess.Popen(
            self.lab.command("head", self.command(script, flags)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill_driver(self, job: subprocess.Popen[str], script: str) -> None:
        """Kill a command that runs on the head, as if the machine had run out of memory."""
        self.lab.run("head", f"pkill -KILL -f '[e]xperiments/{script}'")
        assert job.wait(60) != 0

    def has_cut(self, host: str, job: subprocess.Popen[str]) -> str:
        """Cut a host off until the job ends, then bring it back into the cluster; return what the job printed."""
        started = time.monotonic()
        with self.lab.cut(host):
            said, _ = job.communicate(timeout=600)
        print(f"{time.monotonic() - started:.0f} s from the cut to the end: {fault_lines(said)}", flush=True)
        self.join(host)
        assert job.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def cluster(repository: Path) -> Iterator[Cluster]:
    with open_lab(repository, HOSTS, BASHRC) as lab:
        cluster = Cluster(lab)
        for folder in ("invdyn", "experiments", "configs"):
            shutil.copytree(repository / folder, cluster.project / folder)
        write_recording(cluster.project / "sequence/tiny")
        random = np.random.default_rng(0)
        episodes = [(random.normal(size=(501, 100)), random.normal(size=(500, 20))) for _ in range(48)]
        write_shards(cluster.project / "sequence/wide", episodes)
        write(cluster, "tiny.yaml", name="tiny", buffer_path="sequence/tiny", val_ratio=0.15, test_ratio=0.15)
        write(cluster, "model.yaml", **FLOW, device="cpu", training=RECIPE)
        cluster.start_ray()
        cluster.run("create_dataset.py", "--config tiny.yaml")
        yield cluster


def write(cluster: Cluster, file: str, **values: Any) -> None:
    (cluster.project / file).write_text(yaml.safe_dump(values))


def wait_for(job: subprocess.Popen[str], condition: Callable[[], Any], within_s: float = 120) -> Any:
    """Return what a condition gives as soon as it gives anything, while the job runs."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    return found


def hosts_of(run: Path) -> list[str]:
    return list(json.loads((run / WRITER_FILE).read_text())["hosts"])


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: row[name] for name in row if name not in TIMES} for row in csv.DictReader(file)]


def fault_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(r"lost|cut off|restarted|no step within", line)]


def assert_same_run(found: Path, expected: Path) -> None:
    """The same losses after the same steps, and the same weights; nothing is half written."""
    assert rows_of(found) == rows_of(expected)
    ours, theirs = (list_checkpoints(run)[-1] / WEIGHTS_FILE for run in (found, expected))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not [path for path in found.rglob("*.tmp") if "/ray/" not in str(path)]
    assert not (found / WRITER_FILE).exists()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Path:
    """A run that nothing happens to."""
    cluster.run("train.py", f"{TRAIN} --run_dir runs/whole")
    return cluster.project / "runs/whole"


def test_a_node_is_cut_off_in_mid_training(cluster: Cluster, undisturbed: Path) -> None:
    job = cluster.start("train.py", f"{TRAIN} --run_dir runs/cut")
    run = cluster.project / "runs/cut"
    found = wait_for(job, lambda: list_checkpoints(run))
    host = hosts_of(run)[0]  # of the worker that writes
    said = cluster.has_cut(host, job)
    assert_same_run(run, undisturbed)
    (line,) = fault_lines((run / "train.log").read_text())
    assert line in said
    story = re.fullmatch(
        rf"worker 0 lost on node {host}( after step [\d,]+)?: restarted on 2 worker\(s\) from step ([\d,]+)", line
    )
    assert story, line
    assert int(story[2].replace(",", "")) >= int(found[-1].name.removeprefix("step-"))


def test_the_driver_is_killed_in_mid_training(cluster: Cluster, undisturbed: Path) -> None:
    job = cluster.start("train.py", f"{TRAIN} --run_dir runs/killed")
    run = cluster.project / "runs/killed"
    wait_for(job, lambda: list_checkpoints(run))
    cluster.kill_driver(job, "train.py")
    said = cluster.run("train.py", "--resume runs/killed")
    assert_same_run(run, undisturbed)
    (line,) = fault_lines((run / "train.log").read_text())
    assert line in said
    assert re.fullmatch(r"command was cut off( after step [\d,]+)?: continued on 2 worker\(s\) from step [\d,]+", line)


def test_a_worker_whose_disk_is_full(cluster: Cluster, undisturbed: Path) -> None:
    """What goes to a bucket is gathered on the worker's own disk first."""
    lab = cluster.lab
    server = f"http://{HOSTS['head']}:5000"
    keys = "AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_DEFAULT_REGION=us-east-1"
    lab.run("head", "setsid python -m moto.server -H 0.0.0.0 -p 5000 >/tmp/moto.log 2>&1 & disown")
    lab.run("head", f"until curl -s -X PUT {server}/bucket; do sleep 0.2; done")
    set_keys = f"export {keys} AWS_ENDPOINT_URL={server}; "
    job = subprocess.Popen(
        lab.command("head", set_keys + cluster.command("train.py", f"{TRAIN} --run_dir s3://bucket/run")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    listed = f"curl -s '{server}/bucket?list-type=2&prefix=run/checkpoints'"
    wait_for(job, lambda: WEIGHTS_FILE in lab.run("head", listed))
    for host in WORKERS:
        lab.run(host, "mount -o remount,size=$(df --output=used -k /tmp | tail -1 | tr -d ' ')k /tmp")
    said, _ = job.communicate(timeout=300)
    for host in WORKERS:
        lab.run(host, "mount -o remount,size=1g /tmp")
    assert job.returncode == 2, said
    error = said.splitlines()[-1]
    assert re.match(
        r"error: cannot write checkpoint s3://bucket/run/\S+ \(gathered on w\d in /tmp first\): .*space", error
    )
    assert error.endswith("free some space, then continue with --resume")
    lab.run("head", set_keys + cluster.command("train.py", "--resume s3://bucket/run"))
    copy = "from s3fs import S3FileSystem as S; S().get('bucket/run', 'runs/full', recursive=True)"
    lab.run("head", f'{set_keys} cd {HOME} && python -c "{copy}"')
    assert_same_run(cluster.project / "runs/full", undisturbed)


def parts_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("part-*.h5"))}


@pytest.fixture(scope="module")
def wide(cluster: Cluster) -> Callable[[str], Path]:
    """Write the config of a dataset of many parts, and return where it will be."""

    def configure(name: str) -> Path:
        folder = f"inverse_dynamics/{name}"
        values = {"val_ratio": 0.15, "test_ratio": 0.15, "part_size_mb": 0.1, "output_path": folder}
        write(cluster, f"{name}.yaml", name="wide", buffer_path="sequence/wide", **values)
        return cluster.project / folder

    return configure


@pytest.fixture(scope="module")
def whole(cluster: Cluster, wide: Callable[[str], Path]) -> dict[str, bytes]:
    """The parts of an extraction that nothing happens to."""
    folder = wide("whole")
    cluster.run("create_dataset.py", "--config whole.yaml")
    return parts_of(folder)


def test_a_node_is_cut_off_in_mid_extraction(
    cluster: Cluster, wide: Callable[[str], Path], whole: dict[str, bytes]
) -> None:
    folder = wide("cut")
    job = cluster.start("create_dataset.py", "--config cut.yaml")
    wait_for(job, lambda: len(list(folder.glob("train/part-*.h5"))) > 5)
    said = cluster.has_cut("w2", job)
    assert parts_of(folder) == whole
    assert re.findall("node .* lost: .*", said) == [
        f"node w2 ({HOSTS['w2']}) lost: its unfinished parts are made again on others"
    ]


def test_the_driver_is_killed_in_mid_extraction(
    cluster: Cluster, wide: Callable[[str], Path], whole: dict[str, bytes]
) -> None:
    folder = wide("killed")
    job = cluster.start("create_dataset.py", "--config killed.yaml")
    wait_for(job, lambda: len(list(folder.glob("train/part-*.h5"))) > 5)
    cluster.kill_driver(job, "create_dataset.py")
    assert not (folder / "manifest.json").exists()
    said = cluster.run("create_dataset.py", "--config killed.yaml")
    assert parts_of(folder) == whole
    assert re.search(r"an earlier run was cut off: \d+ of \d+ parts are kept", said)


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return [{n: row[n] for n in row if n not in MEASURED and n != "run_dir"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def best(cluster: Cluster) -> Path:
    """A sweep that nothing happens to."""
    space = {"training.learning_rate": [1e-2, 1e-3]}
    configs = {"dataset_config": "tiny.yaml", "model_config": "model.yaml"}
    write(cluster, "sweep.yaml", name="tiny", space=space, num_epochs=900, asha=None, **configs)
    cluster.lab.run(
        "head", f"cd {HOME} && python experiments/sweep.py --config sweep.yaml --local --output runs/s-whole"
    )
    return cluster.project / "runs/s-whole"


def test_a_node_is_cut_off_in_mid_sweep(cluster: Cluster, best: Path) -> None:
    folder = cluster.project / "runs/s-cut"
    job = cluster.start("sweep.py", "--config sweep.yaml --output runs/s-cut")
    trial = wait_for(
        job, lambda: [path.parent for path in folder.glob("trials/*/metrics.csv") if rows_of(path.parent)]
    )[0]
    (host,) = hosts_of(trial)
    said = cluster.has_cut(host, job)
    assert results(folder) == results(best)
    assert (folder / "best" / WEIGHTS_FILE).read_bytes() == (best / "best" / WEIGHTS_FILE).read_bytes()
    assert said.count(f"node {host} ({HOSTS[host]}) lost: its trials go on from their latest checkpoints") == 1
    assert said.count(f"worker lost with trial {trial.name}: it goes on from its latest checkpoint") == 1
    log = (trial / "train.log").read_text()
    assert re.search(rf"worker lost on node {host}.*: restarted on node w\d from ", log), log


def test_the_driver_is_killed_in_mid_sweep(cluster: Cluster, best: Path) -> None:
    folder = cluster.project / "runs/s-killed"
    job = cluster.start("sweep.py", "--config sweep.yaml --output runs/s-killed")
    wait_for(job, lambda: list(folder.glob("trials/*/checkpoints/step-*")))
    cluster.kill_driver(job, "sweep.py")
    said = cluster.run("sweep.py", "--resume runs/s-killed")
    assert results(folder) == results(best)
    assert (folder / "best" / WEIGHTS_FILE).read_bytes() == (best / "best" / WEIGHTS_FILE).read_bytes()
    assert re.search(r"command was cut off: \d trials are kept, \d go on from their latest checkpoints", said)
