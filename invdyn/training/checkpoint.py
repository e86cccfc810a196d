"""Checkpoints: a folder that is whole or absent, on a disk (renamed when it is) or a storage service (weights last).

`model.safetensors` (the weights to use: the moving average where there is one), `config.yaml` (the run),
`metrics.json`, and `trainer_state.pt` (raw weights, moving average, optimizer, epoch), which is only ever loaded with
weights_only=True. When training has ended, a flow's checkpoint also gets `sampling.json`: the solver and steps to use,
and what others give and cost.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only

from invdyn import storage
from invdyn.errors import ConfigError, DataError
from invdyn.models.base import InverseDynamics
from invdyn.models.constant_dims import WithConstantDims
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting
from invdyn.training.run_config import CONFIG_FILE, RunConfig, resolve_device
from invdyn.url_path import AnyPath, UrlPath, as_path, remove_folder, replacing_folder, write_whole

CHECKPOINTS = "checkpoints"
BEST = "best"
"""Where a sweep keeps its best checkpoint."""

WEIGHTS_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"
STATE_FILE = "trainer_state.pt"
SAMPLING_FILE = "sampling.json"
KEEP_LATEST = 2
SELECTION_METRIC = "val_loss"
EPOCH, STAGE = "epoch", "stage"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        folder: where it was loaded from.
        run_dir: the run's folder; the checkpoint's own folder when it was moved out of its run.
        model: the model in eval mode on the requested device.
        config: the run that made it.
        metrics: metrics at the time of the checkpoint.
    """

    folder: AnyPath
    run_dir: AnyPath
    model: InverseDynamics
    config: RunConfig
    metrics: dict[str, float]

    @property
    def unfinished(self) -> str | None:
        """How far training had come, in words; None where it had ended.

        The best checkpoint of a run that has ended may be an earlier one.
        """
        num_epochs = self.config.training.num_epochs
        if not self.model.trainable or (self.folder / SAMPLING_FILE).is_file():
            return None
        metrics = self.metrics
        found = list_checkpoints(self.run_dir)
        if found and self.folder == _best(found):
            metrics = read_metrics(found[-1])
        epoch = int(metrics.get(EPOCH, num_epochs))
        if epoch >= num_epochs:
            return None
        untrained = self.metrics.get(STAGE, 1) == 0
        return f"unfinished: epoch {epoch} of {num_epochs}" + ("; its flow is not trained yet" if untrained else "")

    def with_constant_dims(self) -> InverseDynamics:
        """Return the model in the recording's own dimensions; see `load_model`."""
        constant = self.config.constant_dims
        if constant is None or not (constant.state or constant.action):
            return self.model
        return WithConstantDims(self.model, constant.state, constant.action).to(self.model.device).eval()


def save_checkpoint(
    run_dir: str | AnyPath,
    config: RunConfig,
    step: int,
    weights: dict[str, Tensor],
    trainer_state: dict[str, Any],
    metrics: dict[str, float],
) -> AnyPath:
    """Write a checkpoint and remove older ones, keeping the latest two and the best.

    The best is the one with the lowest validation loss, of those of the last stage of training.

    Raises:
        DataError: when it cannot be written; earlier checkpoints are left as they were.
        StorageError: when a storage service does not take it; likewise.
    """
    folder = as_path(run_dir) / CHECKPOINTS / f"step-{step:09d}"
    try:
        _remove_unfinished(folder.parent)
        with replacing_folder(folder, last=WEIGHTS_FILE) as temporary:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in weights.items()}, temporary / WEIGHTS_FILE
            )
            (temporary / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
            (temporary / METRICS_FILE).write_text(json.dumps(metrics, indent=1), encoding="utf-8")
            # Of a view, all that it is a view of would be written: the weights of a whole population.
            torch.save(tree_map_only(Tensor, torch.clone, trainer_state), temporary / STATE_FILE)
        _remove_old(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot write checkpoint {folder}{storage.gathering_place(str(folder))}: {reason}; free some space, then "
            "continue with --resume"
        ) from None
    return folder


def load_checkpoint(path: str | AnyPath, device: str | None = "cpu") -> Checkpoint:
    """Load a checkpoint folder, or the best checkpoint of a run folder.

    Args:
        path: a run folder, or a folder that holds `model.safetensors`; or its URL.
        device: cpu, cuda, cuda:N or auto.

    Raises:
        DataError: when there is no whole checkpoint, or weights and config disagree.
    """
    folder = find_checkpoint(path)
    config = RunConfig.load(folder)
    model = config.build_model()
    try:
        model.load_state_dict(load((folder / WEIGHTS_FILE).read_bytes()))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"checkpoint cannot be loaded: {folder / WEIGHTS_FILE}: {reason}") from None
    apply_sampling(model, folder)
    run_dir = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    return Checkpoint(folder, run_dir, model.to(resolve_device(device)).eval(), config, read_metrics(folder))


def load_model(path: str | AnyPath, device: str | None = "cpu") -> InverseDynamics:
    """Load the model of a run or checkpoint folder, to predict in the recording's own dimensions.

    See `load_checkpoint`, whose model takes the dataset's rows: without the dimensions that `drop_constant_dims` left
    out of them, if any.
    """
    return load_checkpoint(path, device).with_constant_dims()


def write_sampling(folder: AnyPath, chosen: SamplingSetting, curve: Sequence[Mapping[str, Any]]) -> None:
    """Write `sampling.json` of a checkpoint.

    Args:
        folder: of the checkpoint.
        chosen: what `sample` uses unless it is told otherwise.
        curve: quality, cost and calibrated spread of each validated setting; see `SettingQuality`.
    """
    values = {"chosen": chosen._asdict(), "curve": list(curve)}
    write_whole(folder / SAMPLING_FILE, json.dumps(values, indent=1))


def choose_steps(folder: AnyPath, num_inference_steps: int) -> None:
    """Make another number of steps the one that a checkpoint's model samples with, if it has chosen one."""
    if (values := _read_sampling(folder)) is not None:
        chosen = SamplingSetting(values["chosen"]["solver"], num_inference_steps)
        write_sampling(folder, chosen, values["curve"])


def apply_sampling(model: InverseDynamics, folder: AnyPath) -> None:
    """Make a flow sample as `sampling.json` of its checkpoint says; nothing happens without one.

    Raises:
        DataError: when the file cannot be read, or does not fit the model.
    """
    values = _read_sampling(folder)
    if values is None or not isinstance(model, FlowInverseDynamics):
        return
    try:
        settings = [
            SamplingSetting(v["solver"], v["num_inference_steps"]) for v in (values["chosen"], *values["curve"])
        ]
        for setting in settings:
            model.check_sampling(setting.num_inference_steps, setting.solver)
        spreads = {
            setting: tuple(map(float, v["spread"])) for setting, v in zip(settings[1:], values["curve"], strict=True)
        }
        if any(len(spread) != model.target_dim for spread in spreads.values()):
            raise ConfigError(f"spread must hold {model.target_dim} numbers")
    except (LookupError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise DataError(f"sampling settings do not fit the model: {folder / SAMPLING_FILE}: {error}") from None
    model.use_sampling(settings[0], settings)
    model.spreads = spreads


def _read_sampling(folder: AnyPath) -> dict[str, Any] | None:
    path = folder / SAMPLING_FILE
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"sampling settings cannot be read: {path}: {error}") from None
    return values


def load_trainer_state(folder: AnyPath, device: torch.device) -> dict[str, Any]:
    """Read the trainer's state; only tensors and plain values are accepted.

    Raises:
        DataError: when the file is missing or holds anything else.
    """
    path = folder / STATE_FILE
    try:
        state = torch.load(io.BytesIO(path.read_bytes()), map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"trainer state cannot be loaded: {path}: {reason}; start a new run") from None
    if not isinstance(state, dict):
        raise DataError(f"trainer state must be a mapping: {path} holds {type(state).__name__}; start a new run")
    return state


def find_checkpoint(path: str | AnyPath) -> AnyPath:
    """Return the checkpoint folder that a path means: itself, or the best one of a run.

    Raises:
        DataError: when there is none.
    """
    path = as_path(path)
    if (path / WEIGHTS_FILE).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        what = "holds no finished checkpoint" if path.is_dir() else "is a file" if path.is_file() else "does not exist"
        in_sweep = path / BEST
        give = in_sweep if (in_sweep / WEIGHTS_FILE).is_file() else "a run folder made by experiments/train.py"
        raise DataError(f"checkpoint not found: {path} {what}; give {give}")
    return _best(found)


def list_checkpoints(run_dir: str | AnyPath) -> list[AnyPath]:
    """Return a run's whole checkpoints, oldest first."""
    folder = as_path(run_dir) / CHECKPOINTS
    if isinstance(folder, UrlPath):  # one request, however many there are
        return [folder / name for name in sorted(_whole(storage.list_names(str(folder), recursive=True)))]
    return [*sorted(p for p in folder.glob("step-*") if (p / WEIGHTS_FILE).is_file())]


def read_metrics(folder: AnyPath) -> dict[str, float]:
    """Read `metrics.json` of a checkpoint.

    Raises:
        DataError: when it is missing or not JSON.
    """
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"checkpoint metrics cannot be read: {folder / METRICS_FILE}: {error}") from None
    if not isinstance(metrics, dict):
        raise DataError(f"checkpoint metrics must be a mapping: {folder / METRICS_FILE} holds {metrics!r}")
    return metrics


def _best(checkpoints: list[AnyPath]) -> AnyPath:
    metrics = [read_metrics(path) for path in checkpoints]
    last_stage = max(each.get(STAGE, 0) for each in metrics)  # before it, parts of the model are not trained at all
    scores = [each.get(SELECTION_METRIC) if each.get(STAGE, 0) == last_stage else None for each in metrics]
    # Without a validation split there is no such metric: then the latest.
    scored = [(score, -i) for i, score in enumerate(scores) if score is not None and math.isfinite(score)]
    return checkpoints[-min(scored)[1]] if scored else checkpoints[-1]


def _remove_old(folder: AnyPath) -> None:
    found = list_checkpoints(folder.parent)
    keep = {*found[-KEEP_LATEST:], _best(found)}
    for path in found:
        if path not in keep:
            remove_folder(path, first=WEIGHTS_FILE)


def _remove_unfinished(folder: AnyPath) -> None:
    """Remove what a killed run left behind; only one process of a run writes checkpoints."""
    if isinstance(folder, UrlPath):
        names = storage.list_names(str(folder), recursive=True)
        whole = _whole(names)
        storage.remove(str(folder / name) for name in names if name.partition("/")[0] not in whole)
        return
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def _whole(names: Sequence[str]) -> set[str]:
    """Return the folders among `FOLDER/FILE` names whose last file has arrived."""
    return {folder for folder, _, name in (each.rpartition("/") for each in names) if name == WEIGHTS_FILE}
