"""Ray Train: the same loop on several workers, restarted from the latest checkpoint when one is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from invdyn import storage
from invdyn.arrow_storage import for_ray
from invdyn.errors import ConfigError, DataError, InvdynError, StorageError, TrainingDiverged
from invdyn.nodes import SharedFiles, shared_files
from invdyn.training.batches import Share, count_steps
from invdyn.training.faults import FaultNotes
from invdyn.training.followed_log import FollowedLog
from invdyn.training.loop import open_store, train_loop
from invdyn.training.run_config import RunConfig, resolve_device
from invdyn.training.student import check_student
from invdyn.training.tracking import CONSOLE_LOG
from invdyn.training.worker import Metrics, Worker, stopping_together
from invdyn.transitions.store import MANIFEST
from invdyn.url_path import AnyPath, as_path

MAX_RESTARTS = 1000
"""All together, for workers that are lost before they begin; see `FaultNotes`."""
START_TIMEOUT_S = 15
"""How long an elastic run waits for workers on nodes that may be gone before it looks at the nodes again."""
RESIZE_INTERVAL_S = 30.0
"""How often an elastic run looks for nodes that have joined: each change costs a restart from the latest checkpoint."""
PEER_GRACE_S = 2.0
WATCHDOG_FIRST_S = 10.0
"""How much later than the others' watchdogs, which know the step, Ray may end a worker that gives no answer."""
AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` tells the head what it may start."""
LARGEST_RESOURCES = "INVDYN_LARGEST_RESOURCES"
"""Variable that tells it, as JSON, where no `ray up` does (Kubernetes)."""


def train(config: RunConfig, *, local: bool = False, resume: bool = False) -> Metrics:
    """Check a run with `check_run` and train it with `train_checked`.

    Args:
        config: the run; every node must reach its `run_dir` and its dataset.
        local: use this process only; Ray is not imported.
        resume: continue the run in `run_dir`.

    Returns:
        The last row of metrics; see `train_loop`.

    Raises:
        ConfigError: see both, or when the run folder exists already.
        DataError: see `train_loop`.
        TrainingDiverged: see `train_loop`.
        WorkersLost: see `train_checked`.
    """
    check_run(config, local)
    if not resume:
        check_new_folder(as_path(config.run_dir))
    return train_checked(config, local=local)


def train_checked(config: RunConfig, *, local: bool = False) -> Metrics:
    """Train a run: in this process when `local`, else on `config.num_workers` Ray Train workers.

    Returns:
        The last row of metrics; see `train_loop`.

    Raises:
        ConfigError: when the run folder cannot be written, the cluster has not what the run asks for, or a node does
            not reach the run's files.
        DataError: see `train_loop`.
        TrainingDiverged: see `train_loop`.
        WorkersLost: when they are lost again and again without a new checkpoint.
    """
    if local:
        config.save()
        # Nobody would restart it, and a breakpoint takes as long as it takes.
        return train_loop(config.replace(hang_timeout_s=0), Worker(resolve_device(config.device)))
    use_gpu = choose_gpu(config.device, cluster_resources(), fewest_workers(config))
    manifest = storage.join(config.dataset_path, MANIFEST)
    with shared_files(config.run_dir, [manifest], {"GPU" if use_gpu else "CPU": 1}) as files:
        config.save()
        return _train_on_ray(config, use_gpu, files)


def check_run(config: RunConfig, local: bool) -> None:
    """Find what would stop the run before anything is written or started.

    Raises:
        ConfigError: for several workers or a missing device with `local`, or a batch that workers cannot share.
        DataError: when the dataset is missing, changed, or too small for one batch.
    """
    if fewest_workers(config) > config.num_workers:
        raise ConfigError(
            f"--min_workers must be at most --num_workers: got {config.min_workers} of {config.num_workers}"
        )
    if local:
        if config.num_workers > 1:
            raise ConfigError(
                f"--local trains in one process, got --num_workers {config.num_workers}; drop one of them"
            )
        resolve_device(config.device)
    else:
        storage.check_shared("the dataset", config.dataset_path)
        storage.check_shared("run_dir", config.run_dir)
    store = open_store(config)
    model = config.build_model()
    check_student(config)
    if model.trainable:
        Share(config.training.batch_size, 0, config.num_workers)
        count_steps(store.num_rows("train"), config.training.batch_size)


def fewest_workers(config: RunConfig) -> int:
    """Return with how many workers a run starts, or goes on."""
    return config.num_workers if config.min_workers is None else config.min_workers


def check_new_folder(folder: AnyPath) -> None:
    """Check that a new run does not write into what is there.

    Raises:
        ConfigError: when the folder holds anything, or cannot be read.
    """
    try:
        taken = folder.is_dir() and any(True for _ in folder.iterdir())
    except OSError as error:
        raise ConfigError(f"run folder cannot be read: {folder}: {error.strerror or error}") from None
    if taken:
        raise ConfigError(
            f"run folder exists already: {folder}; continue it with --resume {folder} or give another --run_dir"
        )


def cluster_resources() -> dict[str, float]:
    """Return the CPUs, GPUs and other resources of the cluster, those that its autoscaler can still start included."""
    import ray

    now = ray.cluster_resources()
    largest = _read_autoscaler_limits(ray.get_runtime_context().gcs_address, ray.util.get_node_ip_address())
    return {name: max(now.get(name, 0.0), largest.get(name, 0.0)) for name in {*now, *largest}}


def _read_autoscaler_limits(gcs_address: str, own_address: str) -> dict[str, float]:
    """Return what an autoscaler may start, where this process runs on the head; Ray itself does not tell (2.60)."""
    if stated := os.environ.get(LARGEST_RESOURCES):
        return {name: float(amount) for name, amount in json.loads(stated).items()}
    path = AUTOSCALER_CONFIG.expanduser()
    if gcs_address.rpartition(":")[0] != own_address or not path.is_file():
        return {}
    return largest_resources(yaml.safe_load(path.read_text(encoding="utf-8")))


def largest_resources(autoscaler: Mapping[str, Any]) -> dict[str, float]:
    """Return how much of each resource the workers of an autoscaler's config can have together."""
    head, limit = autoscaler["head_node_type"], int(autoscaler["max_workers"])
    workers = [node for name, node in autoscaler["available_node_types"].items() if name != head]
    return {
        name: _most([(node["resources"].get(name, 0), node.get("max_workers", limit)) for node in workers], limit)
        for name in {name for node in workers for name in node["resources"]}
    }


def _most(amounts: list[tuple[float, int]], limit: int) -> float:
    """Return the largest sum of at most `limit` amounts, each of which is there so many times."""
    total = 0.0
    for amount, count in sorted(amounts, reverse=True):
        taken = min(count, limit)
        total += amount * taken
        limit -= taken
    return total


def _train_on_ray(config: RunConfig, use_gpu: bool, files: SharedFiles) -> Metrics:
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import ControllerError

    values = config.to_values()
    path, filesystem = for_ray(str(as_path(config.run_dir) / "ray"))
    # The Ray run only carries the workers: our own checkpoints decide where a run continues, so its name is unique.
    trainer = TorchTrainer(
        # Not as train_loop_config, which the dashboard shows: credentials are among the files.
        lambda: _worker_main(values, files),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers if config.min_workers is None else (config.min_workers, config.num_workers),
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        # Ray takes NCCL for whatever has GPUs; not every build of torch has it.
        torch_config=TorchConfig(backend="nccl" if use_gpu and torch.distributed.is_nccl_available() else "gloo"),
        run_config=RayRunConfig(
            name=f"ray-{time.time_ns()}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            callbacks=[_fault_callback(config.run_dir, files.environment)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    with FollowedLog(as_path(config.run_dir) / CONSOLE_LOG), _interruptible(), _patience(config):
        try:
            outcome: dict[str, Any] = trainer.fit().return_value
        except ControllerError as error:
            if isinstance(error.controller_failure, InvdynError):
                raise error.controller_failure from None
            raise
    if "error" in outcome:
        kinds = {kind.__name__: kind for kind in (ConfigError, StorageError, TrainingDiverged)}
        raise kinds.get(outcome["kind"], DataError)(outcome["error"])
    metrics: Metrics = outcome["metrics"]
    return metrics


def choose_gpu(device: str, resources: dict[str, float], num_workers: int) -> bool:
    """Return whether workers get a GPU each.

    Raises:
        ConfigError: when cuda is asked for and the cluster has fewer GPUs than workers.
    """
    gpus = int(resources.get("GPU", 0))
    if device.startswith("cuda") and gpus < num_workers:
        raise ConfigError(
            f"--device cuda needs a GPU for each worker: {num_workers} worker(s), the cluster has {gpus} GPUs; use "
            "--device cpu or auto, or fewer --num_workers"
        )
    return device.startswith("cuda") or (device == "auto" and gpus >= num_workers)


def _worker_main(values: dict[str, Any], files: SharedFiles) -> dict[str, Any]:
    """Run the loop on one Ray Train worker; what a user can mend is returned, so that Ray does not retry it."""
    import ray.train.torch

    storage.set_environment(files.environment)
    config = RunConfig.from_values(values, where="run config")
    context = ray.train.get_context()
    worker = join_group(
        ray.train.torch.get_device(),
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_world_size(),
    )
    worker = replace(worker, hosts=_all_hosts(worker.world_size), job=files.token)
    try:
        with stopping_together(worker):
            files.check_here()
        return {"metrics": train_loop(config, worker)}
    except InvdynError as error:
        if isinstance(worker.agree, Agreement) and not worker.agree.holds_for(error):
            raise  # met by this worker alone, the others wait for it: Ray must restart all of them
        return {"error": str(error), "kind": type(error).__name__}
    except RuntimeError:
        if worker.world_size > 1:
            time.sleep(PEER_GRACE_S)  # when another worker is gone, Ray is to hear of that one first
        raise


def _all_hosts(world_size: int) -> tuple[str, ...]:
    """Return the names of the nodes of all workers, by rank; all must call."""
    hosts = [socket.gethostname()] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(hosts, hosts[0])
    return tuple(hosts)


def _fault_callback(run_dir: str, environment: Mapping[str, str]) -> Any:
    from ray.train import UserCallback

    class Callback(FaultNotes, UserCallback):  # type: ignore[misc]
        """Ray's kind of our notes."""

    return Callback(run_dir, environment)


def join_group(device: torch.device, rank: int, world_size: int, on_machine: int) -> Worker:
    """Return this process as a member of torch's process group, which must be up when there are several workers."""
    if world_size == 1:
        return Worker(device, echo=False)
    return Worker(
        device,
        rank,
        world_size,
        on_machine,
        wrap=_data_parallel(device),
        mean=_mean_over_workers,
        agree=Agreement(),
        echo=False,
    )


def _data_parallel(device: torch.device) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    ids = [device.index or 0] if device.type == "cuda" else None
    # Buffers hold the normalisation, the same everywhere: broadcasting them every step would be waste.
    return lambda module: DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def _mean_over_workers(value: Tensor) -> Tensor:
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


class Agreement:
    """Raises on every worker the first error that one of them has met."""

    def __init__(self) -> None:
        self.error: InvdynError | None = None

    def holds_for(self, error: InvdynError) -> bool:
        """Return whether all workers stop with this error; a diverged loss is a mean that all of them see."""
        return error is self.error or isinstance(error, TrainingDiverged)

    def __call__(self, error: InvdynError | None) -> None:
        """Exchange errors; all workers must call."""
        errors: list[InvdynError | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, error)
        self.error = next((found for found in errors if found is not None), None)
        if self.error is not None:
            raise self.error


@contextmanager
def _patience(config: RunConfig) -> Iterator[None]:
    """Tell Ray, which reads it from the environment, how long to wait for a worker; what the user set stays."""
    wanted: dict[str, str] = {}
    if config.min_workers is not None:
        wanted["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(START_TIMEOUT_S)
    if config.hang_timeout_s:
        wanted["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.hang_timeout_s + WATCHDOG_FIRST_S)
    mine = wanted.keys() - os.environ.keys()
    os.environ.update({name: wanted[name] for name in mine})
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt: Ray's handler aborts the workers, leaves by SystemExit, and stays installed."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
