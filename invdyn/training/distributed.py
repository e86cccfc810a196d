"""Ray Train: the same loop on several workers, restarted from the latest checkpoint when one is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdyn.errors import ConfigError, DataError, InvdynError, TrainingDiverged
from invdyn.training.loop import Metrics, Worker, train_loop
from invdyn.training.run_config import CONFIG_FILE, RunConfig, resolve_device
from invdyn.training.tracking import CONSOLE_LOG

MAX_FAILURES = 3
TAIL_INTERVAL_S = 0.5


def train(config: RunConfig, *, local: bool = False, resume: bool = False) -> Metrics:
    """Train a run: in this process when `local`, else on `config.num_workers` Ray Train workers.

    Args:
        config: the run; its `run_dir` must be on storage that every worker reaches.
        local: use this process only; Ray is not imported.
        resume: continue the run in `run_dir`.

    Returns:
        The last row of metrics; see `train_loop`.

    Raises:
        ConfigError: when the run folder exists already, or the cluster has not what the run asks for.
        DataError: see `train_loop`.
        TrainingDiverged: see `train_loop`.
    """
    prepare_run_dir(config, resume)
    if local:
        if config.num_workers > 1:
            raise ConfigError(
                f"--local trains in one process, got --num_workers {config.num_workers}; drop one of them"
            )
        return train_loop(config, Worker(resolve_device(config.device)))
    return _train_on_ray(config)


def prepare_run_dir(config: RunConfig, resume: bool) -> None:
    """Create the run folder with its config.

    Raises:
        ConfigError: when it exists and `resume` is not set, or cannot be written.
    """
    folder = Path(config.run_dir)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise ConfigError(
            f"run folder exists already: {folder}; continue it with --resume {folder} or give another --run_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run folder cannot be written: {folder}: {error}") from None


def _train_on_ray(config: RunConfig) -> Metrics:
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    use_gpu = choose_gpu(config.device, ray.cluster_resources(), config.num_workers)
    # The Ray run only carries the workers: our own checkpoints decide where a run continues, so its name is unique.
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={"config": config.to_values()},
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu),
        run_config=RayRunConfig(
            name=f"ray-{time.time_ns()}",
            storage_path=str(Path(config.run_dir) / "ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    with _FollowLog(Path(config.run_dir) / CONSOLE_LOG):
        outcome: dict[str, Any] = trainer.fit().return_value
    if "error" in outcome:
        kinds: dict[str, type[InvdynError]] = {"TrainingDiverged": TrainingDiverged, "ConfigError": ConfigError}
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
            f"--device cuda needs a GPU for each worker: {num_workers} worker(s), the cluster has {gpus} GPUs; use --device "
            "cpu or auto, or fewer --num_workers"
        )
    return device.startswith("cuda") or (device == "auto" and gpus >= num_workers)


def _worker_main(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Run the loop on one Ray Train worker; what a user can mend is returned, so that Ray does not retry it."""
    import ray.train.torch

    config = RunConfig.from_values(loop_config["config"], where="run config")
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    world_size = context.get_world_size()
    together = {"wrap": _data_parallel(device), "mean": _mean_over_workers} if world_size > 1 else {}
    worker = Worker(device, context.get_world_rank(), world_size, echo=False, **together)
    try:
        return {"metrics": train_loop(config, worker)}
    except InvdynError as error:
        return {"error": str(error), "kind": type(error).__name__}


def _data_parallel(device: torch.device) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    ids = [device.index or 0] if device.type == "cuda" else None
    # Buffers hold the normalisation, the same everywhere: broadcasting them every step would be waste.
    return lambda module: DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def _mean_over_workers(value: Tensor) -> Tensor:
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


class _FollowLog:
    """Print what the run's rank 0 appends to its log, wherever on the cluster it runs."""

    def __init__(self, path: Path):
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._print_new()

    def _follow(self) -> None:
        while not self.stopped.wait(TAIL_INTERVAL_S):
            self._print_new()

    def _print_new(self) -> None:
        if self.path.exists():
            with self.path.open(encoding="utf-8") as file:
                file.seek(self.position)
                print(file.read(), end="", flush=True)
                self.position = file.tell()
