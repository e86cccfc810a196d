"""What one training run is: enough to repeat it, saved as `config.yaml` in the run and in every checkpoint."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, SerializeAsAny, field_validator

from invdyn import storage
from invdyn.config import Config, read_yaml, validate
from invdyn.errors import ConfigError
from invdyn.models.base import InverseDynamics
from invdyn.models.recipe import TrainingRecipe
from invdyn.models.registry import ModelConfig, build_model, parse_model_config
from invdyn.transitions.filters import ConstantDims
from invdyn.transitions.store import TransitionStore
from invdyn.url_path import AnyPath, as_path, write_whole

CONFIG_FILE = "config.yaml"
HANG_TIMEOUT_S = 600.0


def current_versions() -> dict[str, str]:
    """Return the versions that a result depends on; `commit` ends in + when files differ from it."""
    return dict(_find_versions())


@cache
def _find_versions() -> dict[str, str]:
    packages = ("torch", "numpy", "ray", "h5py", "mujoco", "gymnasium")
    found = {name: metadata.version(name) for name in ("invdyn", *packages) if _installed(name)}
    return {"python": platform.python_version(), **found, "commit": git_commit()}


class TrackingConfig(Config):
    """Where metrics go beside the local CSV.

    Attributes:
        mode: of W&B; None for its own environment variables, then online where an account is set up, else offline.
        project: W&B project.
        group: W&B group; a sweep's name.
        name: W&B run name; the run folder's name when None.
    """

    mode: Literal["online", "offline", "disabled"] | None = None
    project: str = "invdyn"
    group: str | None = None
    name: str | None = None


class RunConfig(Config):
    """One training run.

    Attributes:
        dataset_name: name of the dataset.
        dataset_path: absolute path of the transitions folder.
        dataset_hash: content hash of the dataset; a run only continues on the same rows.
        state_dim: of the dataset's rows; likewise action_dim, history, horizon.
        constant_dims: dimensions of the recording that are not in the rows; `load_model` restores them.
        model: the model and its recipe.
        training: the recipe with the flags applied.
        run_dir: absolute path or URL of the run's folder.
        device: auto, cpu, cuda or cuda:N.
        num_workers: processes that train together.
        min_workers: with how many of them the run goes on while nodes are missing; None for all.
        hang_timeout_s: workers on Ray that take no step for so many seconds are restarted; 0 for no limit.
        compile: take the steps as one compiled graph (needs a C++ compiler on a CPU); None for where a run is long
            enough to pay for the compiling.
        precision: of the products of the forward and backward pass; bfloat16 by autocast.
        cpu_threads: threads of a CPU worker; networks of these sizes are several times slower on more than one.
        resident: keep the training rows in memory; None to decide by the memory that is free.
        val_rows: validation rows used while training.
        checkpoints: how many checkpoints to write over the run.
        tracking: W&B.
        versions: of Python, the packages, and the project's commit.
    """

    dataset_name: str
    dataset_path: str
    dataset_hash: str
    state_dim: int
    action_dim: int
    history: int = 0
    horizon: int = 1
    constant_dims: ConstantDims | None = None
    model: SerializeAsAny[ModelConfig]
    training: TrainingRecipe
    run_dir: str
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    num_workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1)
    hang_timeout_s: float = Field(default=HANG_TIMEOUT_S, ge=0)
    compile: bool | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    cpu_threads: int = Field(default=1, ge=1)
    resident: bool | None = None
    val_rows: int = Field(default=4096, ge=1)
    checkpoints: int = Field(default=10, ge=1)
    tracking: TrackingConfig = TrackingConfig()
    versions: dict[str, str] = Field(default_factory=current_versions)

    @field_validator("model", mode="before")
    @classmethod
    def _parse_model(cls, value: Any) -> Any:
        return value if isinstance(value, ModelConfig) else parse_model_config(value, where="model")

    def build_model(self) -> InverseDynamics:
        """Build the model for the dimensions of the dataset; seed torch first for the same weights again."""
        return build_model(self.model, self.state_dim, self.action_dim, self.history, self.horizon)

    @classmethod
    def for_dataset(cls, store: TransitionStore, run_dir: str | AnyPath, **values: Any) -> RunConfig:
        """Return a run on a dataset: its rows decide the model's dimensions.

        Raises:
            ConfigError: when one of `values` is not valid.
        """
        if isinstance(values.get("model"), ModelConfig):
            values["model"] = values["model"].for_recording(store.manifest["recording"])
        values |= {
            "dataset_name": store.manifest["name"],
            "dataset_path": storage.absolute(store.path),
            "dataset_hash": store.content_hash,
            "state_dim": store.state_dim,
            "action_dim": store.action_dim,
            "history": store.history,
            "horizon": store.horizon,
            "constant_dims": store.constant_dims,
            "run_dir": storage.absolute(str(run_dir)),
        }
        return cls.from_values(values, where="the given values")

    def to_values(self) -> dict[str, Any]:
        """Return plain values that `from_values` reads back to an equal config."""
        return {**self.model_dump(mode="json", exclude={"model"}), "model": self.model.to_values()}

    @classmethod
    def from_values(cls, values: dict[str, Any], where: str) -> RunConfig:
        """Validate plain values.

        Raises:
            ConfigError: naming `where` and the key.
        """
        return validate(cls, values, where)

    def to_yaml(self) -> str:
        """Return `to_values` as YAML."""
        return yaml.safe_dump(self.to_values(), sort_keys=False)

    def save(self) -> None:
        """Write `config.yaml` into the run's folder, which is made where it is missing.

        Raises:
            ConfigError: when it cannot be written.
        """
        folder = as_path(self.run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / CONFIG_FILE, self.to_yaml())
        except OSError as error:
            raise ConfigError(f"run folder cannot be written: {folder}: {error.strerror or error}") from None

    @classmethod
    def load(cls, folder: str | AnyPath) -> RunConfig:
        """Read `config.yaml` of a run or a checkpoint.

        Raises:
            ConfigError: when it is missing or not valid.
        """
        path = as_path(folder) / CONFIG_FILE
        return cls.from_values(read_yaml(path), where=str(path))


def resolve_device(device: str | None) -> torch.device:
    """Return the device that a config names; auto (None) takes a GPU where there is one.

    Raises:
        ConfigError: for cuda on a machine without it, or a number that does not exist.
    """
    name = device or "auto"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(name)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} must exist: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu "
            "or auto"
        )
    return resolved


def git_commit() -> str:
    """Return the commit of the source tree, or 'unknown' outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
