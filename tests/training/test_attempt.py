"""Who may write into a run's folder, what its log says after a fault, and the end of training that hangs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from invdyn.training.attempt import WRITER_FILE, Attempt, Superseded, attempting, note_fault, read_mark
from invdyn.training.checkpoint import list_checkpoints
from invdyn.training.distributed import train
from invdyn.training.faults import FaultNotes, WorkersLost, describe_failures
from invdyn.training.loop import train_loop
from invdyn.training.watchdog import EXIT_HUNG
from invdyn.training.worker import Metrics
from invdyn.transitions.store import TransitionStore
from invdyn.url_path import as_path
from tests.training.runs import CPU, assert_same_run, run_config

TWO = replace(CPU, world_size=2, hosts=("a", "b"), job="one")


class Lost(Exception):
    """What Ray raises of a worker that is gone has this attribute."""

    health_check_failure = None


@pytest.fixture
def folder(remote: str):
    return as_path(remote) / "run"


def test_only_the_newest_attempt_may_write(folder) -> None:
    old = Attempt.claim(folder, TWO)
    old.check()
    Attempt.join(folder).check()
    new = Attempt.claim(folder, TWO)
    with pytest.raises(Superseded, match=r"only the newest attempt at a run may write into .*run: this one"):
        old.check()
    old.release()
    new.check()
    note_fault(folder, "it hangs", new.mark.token)
    note_fault(folder, "what follows from it")
    with pytest.raises(Superseded):
        new.check()
    assert read_mark(folder) == replace(new.mark, fault="it hangs")


def test_the_mark_goes_when_a_run_ends_by_itself(tmp_path: Path) -> None:
    with attempting(str(tmp_path), CPU):
        assert (tmp_path / WRITER_FILE).exists()
    with pytest.raises(Superseded), attempting(str(tmp_path), CPU) as attempt:
        attempt.check()
        raise Superseded("what users mend")
    assert not (tmp_path / WRITER_FILE).exists()
    with pytest.raises(KeyboardInterrupt), attempting(str(tmp_path), CPU):
        raise KeyboardInterrupt
    assert (tmp_path / WRITER_FILE).exists()


@pytest.mark.parametrize(
    ("fault", "worker", "story"),
    [
        (
            "worker 1 lost on node b",
            TWO,
            "worker 1 lost on node b after step 90: restarted on 2 worker(s) from step 60",
        ),
        (None, replace(TWO, job="two"), "command was cut off after step 90: continued on 2 worker(s) from step 60"),
        (
            None,
            replace(CPU, hosts=("a",), job="one"),
            "nodes joined or left after step 90: 1 worker(s) in place of 2 go on from step 60",
        ),
        (None, TWO, "worker lost on node a after step 90: restarted on node a from step 60"),
    ],
)
def test_one_line_says_what_happened_and_what_was_done(tmp_path: Path, fault, worker, story: str) -> None:
    first = Attempt.claim(tmp_path, TWO)
    assert first.story(0, 0) is None
    if fault:
        note_fault(tmp_path, fault)
    second = Attempt.claim(tmp_path, worker)
    assert second.story(90, 60) == story
    assert second.story(0, 0) == story.replace(" after step 90", "").replace("from step 60", "from the start")


def test_failures_in_words() -> None:
    hosts = ("a", "b", "b")
    closed = RuntimeError("Connection closed\nby peer")
    assert describe_failures({0: closed, 1: Lost(), 2: Lost()}, hosts) == "worker 1, 2 lost on node b"
    silent = type("WorkerHealthCheckTimeoutError", (Exception,), {})()
    assert describe_failures({0: closed, 2: silent}, hosts) == "worker 2 gave no answer any more on node b"
    assert describe_failures({1: closed}, hosts) == "worker 1 failed on node b: RuntimeError: Connection closed by peer"


def test_a_run_is_given_up_when_it_gets_no_further(store: TransitionStore, tmp_path: Path) -> None:
    notes = FaultNotes(str(tmp_path), {})
    notes.after_exception(None, {0: Lost()})  # before it has begun
    mark = read_mark(tmp_path)
    assert mark is not None
    assert mark.fault == "worker 0 lost"
    for _ in range(2):
        Attempt.claim(tmp_path, TWO)
        notes.after_exception(None, {0: Lost()})
        notes.after_exception(None, {0: Lost()})  # Ray may say it again
    checkpoint = tmp_path / "checkpoints/step-000000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").touch()
    for _ in range(3):
        Attempt.claim(tmp_path, TWO)
        notes.after_exception(None, {0: Lost()})
    Attempt.claim(tmp_path, TWO)
    with pytest.raises(WorkersLost, match=r"3 restarts without a new checkpoint: worker 1 lost on node b; .*--resume"):
        notes.after_exception(None, {1: Lost()})


def test_an_attempt_that_was_taken_for_lost_writes_nothing(store: TransitionStore, tmp_path: Path) -> None:
    """It lives on beside the one that took its place: here, both train in this process at the same time."""
    whole = run_config(store, tmp_path / "whole", checkpoints=4)
    train(whole, local=True)
    config = run_config(store, tmp_path / "run", checkpoints=4)
    written: list[dict[str, bytes]] = []

    def take_over(metrics: Metrics) -> None:
        if metrics["epoch"] == 2 and not written:
            note_fault(tmp_path / "run", "worker 0 lost on node a")
            train_loop(config, CPU)
            written.append(contents(tmp_path / "run"))

    with pytest.raises(Superseded):
        train_loop(config, replace(CPU, on_metrics=take_over))
    assert contents(tmp_path / "run") == written[0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    log = (tmp_path / "run/train.log").read_text().splitlines()
    steps = int(list_checkpoints(tmp_path / "run")[-1].name.removeprefix("step-")) // 2
    assert log.count(f"worker 0 lost on node a: restarted on 1 worker(s) from step {steps:,}") == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HANGS = """
import sys, time
from pathlib import Path
from dataclasses import replace
from invdyn.training.loop import train_loop
from invdyn.training.run_config import RunConfig
from tests.training.runs import CPU

def hang(metrics):
    if metrics["epoch"] == 2:
        time.sleep(100)

config = RunConfig.load(Path(sys.argv[1]))
train_loop(config, replace(CPU, hosts=("a",), on_metrics=hang))
"""


def test_training_that_hangs_is_ended_and_goes_on(store: TransitionStore, tmp_path: Path, repository: Path) -> None:
    config = run_config(store, tmp_path / "run", checkpoints=4, hang_timeout_s=1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path / "run")],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == EXIT_HUNG, done.stderr
    assert "in hang" in done.stderr  # where the thread is
    mark = read_mark(tmp_path / "run")
    assert mark is not None
    step = config.training.num_epochs // 2 * (store.num_rows("train") // config.training.batch_size)
    assert str(mark.fault).startswith(f"no step within 1 s after step {step} on node ")
    train(config, local=True, resume=True)
    train(run_config(store, tmp_path / "whole", checkpoints=4), local=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    (line,) = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if "no step within" in line]
    assert " after step " in line
    assert "restarted on 1 worker(s) from step " in line
    assert not (tmp_path / "run" / WRITER_FILE).exists()


def test_marks_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert read_mark(tmp_path) is None
    (tmp_path / WRITER_FILE).write_text("{")
    assert read_mark(tmp_path) is None
