from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from invdyn.errors import ConfigError, DataError
from invdyn.training import distributed
from invdyn.training.checkpoint import list_checkpoints
from invdyn.training.distributed import check_new_folder, check_run, choose_gpu, train
from invdyn.training.faults import WorkersLost
from invdyn.training.followed_log import INTERVAL_S, FollowedLog
from invdyn.transitions.store import TransitionStore
from tests.training.group import train_in_group
from tests.training.runs import LINEAR, TWO_STAGES, read_metrics_csv, run_config
from tests.training.waiting import wait_for

ROUNDING = 1e-4


def assert_same_to_rounding(found: Path, expected: Path) -> None:
    rows, wanted = read_metrics_csv(found), read_metrics_csv(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx(
            {k: float(v) for k, v in want.items()}, rel=ROUNDING
        )
    ours, theirs = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (found, expected))
    for name, value in theirs.items():
        assert ours[name].numpy() == pytest.approx(value.numpy(), rel=ROUNDING, abs=ROUNDING)


TWO_EPOCHS: dict[str, Any] = {"num_epochs": 2, "max_grad_norm": 1.0}


class Group(NamedTuple):
    folder: Path
    outcomes: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def group(store: TransitionStore, tmp_path_factory: pytest.TempPathFactory) -> Group:
    """Several runs on the same two processes: starting them is what takes time."""
    folder = tmp_path_factory.mktemp("group")
    (folder / "full").mkdir()
    (folder / "full/checkpoints").write_text("a file where a folder is needed")
    configs = {
        "resident": run_config(store, folder / "resident", resident=True, **TWO_EPOCHS),
        "streamed": run_config(store, folder / "streamed", resident=False, **TWO_EPOCHS),
        "stages": run_config(store, folder / "stages", TWO_STAGES, **TWO_EPOCHS),
        "full": run_config(store, folder / "full"),
        "diverged": run_config(store, folder / "diverged", learning_rate=1e30),
        "linear": run_config(store, folder / "linear", LINEAR),
    }
    return Group(folder, train_in_group(configs, folder / "outcomes", 2))


@pytest.mark.parametrize("name", ["resident", "streamed"])
def test_two_processes_equal_one_with_the_same_global_batch(
    store: TransitionStore, tmp_path: Path, group: Group, name: str
) -> None:
    train(run_config(store, tmp_path / "one", resident=name == "resident", **TWO_EPOCHS), local=True)
    first, second = group.outcomes[name]
    assert first["metrics"]["epoch"] == 2
    assert second["metrics"] == {}
    assert_same_to_rounding(group.folder / name, tmp_path / "one")
    assert f"({name}); " in (group.folder / name / "train.log").read_text()
    assert "2 worker(s) on cpu" in (group.folder / name / "train.log").read_text()


def test_both_stages_of_training_equal_those_of_one_process(
    store: TransitionStore, tmp_path: Path, group: Group
) -> None:
    train(run_config(store, tmp_path / "one", TWO_STAGES, **TWO_EPOCHS), local=True)
    assert group.outcomes["stages"][0]["metrics"]["epoch"] == 2
    assert_same_to_rounding(group.folder / "stages", tmp_path / "one")


def test_an_error_of_one_process_stops_all_at_once(group: Group) -> None:
    """Only rank 0 writes checkpoints: without an agreement the other waits half an hour in its next all-reduce."""
    first, second = group.outcomes["full"]
    assert first == second
    assert first["kind"] == "DataError"
    assert "cannot write checkpoint" in first["error"]
    assert first["agreed"]


def test_a_diverged_loss_stops_all(group: Group) -> None:
    first, second = group.outcomes["diverged"]
    assert first == second
    assert (first["kind"], first["agreed"]) == ("TrainingDiverged", True)


def test_an_untrained_model_needs_only_the_first_worker(group: Group) -> None:
    first, second = group.outcomes["linear"]
    assert first["metrics"]["val_nrmse"] < 1
    assert second["metrics"] == {}


def test_ray_train_equals_a_local_run(
    store: TransitionStore, tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"num_epochs": 2, "learning_rate": 5e-3}
    local = train(run_config(store, tmp_path / "one", **values), local=True)
    metrics = train(run_config(store, tmp_path / "two", num_workers=2, **values))
    assert metrics["val_loss"] == pytest.approx(local["val_loss"], rel=ROUNDING)
    assert_same_to_rounding(tmp_path / "two", tmp_path / "one")
    shown = capfd.readouterr().out
    assert "2 worker(s) on cpu" in shown
    assert shown.count("epoch 2/2") == 2  # of the local run, and followed from the worker's log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "limit_s", "story"),
    [
        (signal.SIGKILL, 600.0, r"worker 1 lost on node \S+( after step [\d,]+)?: "),
        (signal.SIGSTOP, 5.0, r"no step within 5 s after step [\d,]+ on node \S+: "),
    ],
    ids=["killed", "hung"],
)
def test_a_worker_is_replaced_and_the_run_ends_as_if_nothing_had_happened(
    store: TransitionStore, tmp_path: Path, ray_session: None, stop: signal.Signals, limit_s: float, story: str
) -> None:
    values: dict[str, Any] = {"num_epochs": 40, "checkpoints": 20, "batch_size": 16}
    train(run_config(store, tmp_path / "one", **values), local=True)
    fault = WorkerFault(tmp_path / "two", stop)
    fault.start()
    metrics = train(run_config(store, tmp_path / "two", num_workers=2, hang_timeout_s=limit_s, **values))
    fault.join()
    assert metrics["epoch"] == 40
    log = (tmp_path / "two/train.log").read_text()
    (line,) = [line for line in log.splitlines() if "restarted" in line]
    found = re.fullmatch(story + r"restarted on 2 worker\(s\) from step ([\d,]+)", line)
    assert found, line
    print(f"{line}; next step {fault.next_step_s:.1f} s after the fault")
    assert int(found[found.re.groups].replace(",", "")) >= fault.checkpoint  # what was saved is not done again
    assert_same_to_rounding(tmp_path / "two", tmp_path / "one")
    assert not list((tmp_path / "two").rglob("*.tmp"))


@pytest.mark.slow
def test_a_run_that_gets_no_further_is_given_up(store: TransitionStore, tmp_path: Path, ray_session: None) -> None:
    config = run_config(store, tmp_path / "run", num_epochs=10_000, hang_timeout_s=1e-6)
    with pytest.raises(
        WorkersLost, match=r"given up after 3 restarts without a new checkpoint: no step within 1e-06 s"
    ):
        train(config)
    log = (tmp_path / "run/train.log").read_text()
    assert log.count("restarted on 1 worker(s) from the start") == 3


class WorkerFault(threading.Thread):
    """Sends a signal to a worker of this session's Ray, found by its name, once a checkpoint is there.

    Attributes:
        checkpoint: step of the newest one then.
        next_step_s: seconds from then to the first step of the next attempt.
    """

    def __init__(self, run_dir: Path, stop: signal.Signals):
        super().__init__()
        self.run_dir, self.stop = run_dir, stop
        self.checkpoint, self.next_step_s = -1, -1.0

    def run(self) -> None:
        from ray.util.state import list_actors

        wait_for(lambda: list_checkpoints(self.run_dir))
        actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
        workers = sorted((actor for actor in actors if "TrainWorker" in actor.class_name), key=lambda actor: actor.pid)
        self.checkpoint = newest_step(self.run_dir)
        os.kill(workers[-1].pid, self.stop)
        started = time.monotonic()
        log = self.run_dir / "train.log"
        wait_for(lambda: " restarted on " in log.read_text())
        wait_for(lambda: "  step " in log.read_text().partition(" restarted on ")[2])
        self.next_step_s = time.monotonic() - started


def newest_step(run_dir: Path) -> int:
    return int(list_checkpoints(run_dir)[-1].name.removeprefix("step-"))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_workers": 2}, ConfigError, "--local trains in one process, got --num_workers 2"),
        ({"device": "cuda:7"}, ConfigError, "device 'cuda:7' must exist"),
        ({"dataset_hash": "other"}, DataError, "must continue on the rows it started with"),
        ({"dataset_path": "/absent"}, DataError, "dataset not found: /absent"),
        ({"batch_size": 5000}, DataError, "must hold at least one batch"),
    ],
)
def test_what_cannot_run_is_found_before_anything_is_written(
    store: TransitionStore, tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    recipe = {key: values.pop(key) for key in ("batch_size",) if key in values}
    config = run_config(store, tmp_path / "run", **recipe).replace(**values)
    with pytest.raises(error, match=message):
        train(config, local=True)
    assert not (tmp_path / "run").exists()


def test_every_worker_needs_a_row_of_the_batch(store: TransitionStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must hold a row for each worker: got 2 for 3 workers"):
        check_run(run_config(store, tmp_path, num_workers=3, batch_size=2), local=False)
    check_run(run_config(store, tmp_path, LINEAR, num_workers=3, batch_size=2), local=False)


def test_three_processes_share_a_batch_that_three_do_not_divide(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "three", TWO_STAGES, **TWO_EPOCHS)
    assert config.training.batch_size % 3
    train_in_group({"three": config}, tmp_path / "outcomes", 3)
    train(run_config(store, tmp_path / "one", TWO_STAGES, **TWO_EPOCHS), local=True)
    assert_same_to_rounding(tmp_path / "three", tmp_path / "one")


def test_run_folder_that_exists(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "run")
    (tmp_path / "run").mkdir()
    check_new_folder(tmp_path / "run")  # an empty folder will do
    config.save()
    before = (tmp_path / "run/config.yaml").read_bytes()
    with pytest.raises(
        ConfigError, match=r"run folder exists already: .*/run; continue it with --resume .*/run or give"
    ):
        train(config, local=True)
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    config.replace(num_workers=2).save()
    assert (tmp_path / "run/config.yaml").read_bytes() != before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_run_folder_that_cannot_be_written(store: TransitionStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in ("file", "file/run"):
        with pytest.raises(ConfigError, match=r"run folder cannot be written: .*: (File exists|Not a directory)$"):
            train(run_config(store, tmp_path / path), local=True)


def test_choose_gpu() -> None:
    assert not choose_gpu("cpu", {"GPU": 8}, 1)
    assert choose_gpu("auto", {"GPU": 2}, 2)
    assert not choose_gpu("auto", {"GPU": 1}, 2)
    assert not choose_gpu("auto", {}, 1)
    assert choose_gpu("cuda", {"GPU": 2}, 2)
    with pytest.raises(ConfigError, match=r"2 worker\(s\), the cluster has 1 GPUs; use --device cpu or auto"):
        choose_gpu("cuda", {"GPU": 1}, 2)


def test_cluster_resources_count_what_an_autoscaler_can_add(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = distributed.cluster_resources()
    assert before["CPU"] == 8
    worker = {"resources": {"CPU": 4, "GPU": 1}, "min_workers": 0, "max_workers": 4}
    head = {"resources": {"CPU": 0}, "max_workers": 0}
    written = {"max_workers": 4, "head_node_type": "head", "available_node_types": {"head": head, "gpu": worker}}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(written))  # what `ray up` leaves on the head
    assert distributed.cluster_resources() == {**before, "CPU": 16, "GPU": 4}
    assert distributed._read_autoscaler_limits("10.0.0.9:6379", "10.0.0.7") == {}  # that head is another machine
    monkeypatch.setenv("INVDYN_LARGEST_RESOURCES", '{"GPU": 2}')
    assert distributed.cluster_resources() == {**before, "GPU": 2}


def test_the_largest_cluster_has_the_most_workers_of_the_best_kinds() -> None:
    kinds = {
        "head": {"resources": {"CPU": 64}},
        "small": {"resources": {"CPU": 4}},
        "large": {"resources": {"CPU": 16, "GPU": 2}, "max_workers": 2},
    }
    config = {"max_workers": 3, "head_node_type": "head", "available_node_types": kinds}
    assert distributed.largest_resources(config) == {"CPU": 16 + 16 + 4, "GPU": 4}


def test_follow_log_prints_only_what_is_new(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "train.log"
    log.write_text("before é\n")
    with FollowedLog(log), log.open("a") as file:
        file.write("during\n")
        file.flush()
        time.sleep(1.2 * INTERVAL_S)
        assert "during" in capfd.readouterr().out
        file.write("last words\n")
    assert capfd.readouterr().out == "last words\n"


def test_ctrl_c_is_a_keyboard_interrupt_and_rays_handler_goes() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), distributed._interruptible():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(1)  # what Ray's own handler ends with
    assert signal.getsignal(signal.SIGINT) is handler
