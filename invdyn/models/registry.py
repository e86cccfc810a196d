"""Model configs, and the fixed table from `_target_` names to models.

`_target_` picks from `TARGETS`; a name outside the table is an error, and nothing that a file names is ever imported.
To add a model: write its class next to `mlp_regression.py`, its config here, and one line in `TARGETS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

from invdyn.config import Config, apply_overrides, nearest, read_yaml, validate
from invdyn.errors import ConfigError
from invdyn.models.base import BaseKind, InverseDynamics
from invdyn.models.bounds import BoundRule
from invdyn.models.flow import FlowBaseKind, FlowInverseDynamics, PredictionKind
from invdyn.models.gradient_boosted_trees import GradientBoostedTrees
from invdyn.models.linear import LinearInverse
from invdyn.models.mixture_density import CovarianceKind, GaussianRegression, MixtureDensity
from invdyn.models.mlp_regression import MLPRegression
from invdyn.models.nearest_neighbours import NearestNeighbours
from invdyn.models.physical_oracle import PhysicalOracle
from invdyn.models.recipe import TrainingRecipe
from invdyn.models.solvers import SolverName
from invdyn.models.velocity import NetworkKind

TARGET_KEY = "_target_"
UNCHOSEN_STEPS = 4

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Bound = float | tuple[float, ...]
Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class ModelConfig(Config):
    """What all model configs share.

    Attributes:
        target: name of the model in `TARGETS`; `_target_` in YAML.
        name: free label, shown by reports.
        device: cpu, cuda, cuda:N, or auto (null) for a GPU where there is one.
        training: how to train it.
    """

    model_config = ConfigDict(populate_by_name=True)

    model_class: ClassVar[Callable[..., InverseDynamics]]

    target: str = Field(alias=TARGET_KEY)
    name: str = Field(default="inverse_dynamics", min_length=1)
    device: Device | None = None
    training: TrainingRecipe = TrainingRecipe()

    def to_values(self) -> dict[str, Any]:
        """Return plain values, every default written out, that `parse_model_config` reads back to an equal config."""
        return self.model_dump(mode="json", by_alias=True)

    def for_recording(self, recording: Mapping[str, Any]) -> ModelConfig:  # noqa: ARG002
        """Return this config for a dataset: `recording` is what its recording says of itself (simulator, arguments)."""
        return self

    def build(self, state_dim: int, action_dim: int, history: int, horizon: int) -> InverseDynamics:
        """Return the model, its weights drawn from torch's global generator."""
        return type(self).model_class(state_dim, action_dim, history=history, horizon=horizon, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the model that this config holds: its own fields, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in ModelConfig.model_fields}


class FlowConfig(ModelConfig):
    """Config of `FlowInverseDynamics`; attributes as its arguments.

    Attributes:
        num_inference_steps: null to choose solver and steps on the validation split when training ends (or to take
            `UNCHOSEN_STEPS` where there is none).
    """

    model_class = FlowInverseDynamics

    diffusion_step_embed_dim: PositiveInt = 16
    down_dims: Widths = (16, 32, 64)
    num_inference_steps: PositiveInt | None = 10
    network: NetworkKind = "unet"
    prediction: PredictionKind = "velocity"
    base: FlowBaseKind = "linear"
    base_dims: Widths = (128, 128, 128)
    base_gates: NonNegativeInt = 0
    base_tails: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    time_grading: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    normalize: bool = True
    solver: SolverName = "euler"
    action_bounds: tuple[Bound, Bound] | None = None
    at_bounds: BoundRule = "reflect"

    @field_validator("diffusion_step_embed_dim")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the model, a number of steps among them."""
        return {**super().arguments(), "num_inference_steps": self.num_inference_steps or UNCHOSEN_STEPS}


class MLPRegressionConfig(ModelConfig):
    """Config of `MLPRegression`; attributes as its arguments."""

    model_class = MLPRegression

    down_dims: Widths = (128, 128, 128)
    base: BaseKind = "linear"
    normalize: bool = True


class LinearConfig(ModelConfig):
    """Config of `LinearInverse`."""

    model_class = LinearInverse


class GaussianConfig(ModelConfig):
    """Config of `GaussianRegression`; attributes as its arguments."""

    model_class: ClassVar[Callable[..., InverseDynamics]] = GaussianRegression

    down_dims: Widths = (128, 128, 128)
    covariance: CovarianceKind = "full"
    base: BaseKind = "linear"
    normalize: bool = True


class MixtureConfig(GaussianConfig):
    """Config of `MixtureDensity`; attributes as its arguments."""

    model_class = MixtureDensity

    num_components: PositiveInt = 8


class NearestNeighboursConfig(ModelConfig):
    """Config of `NearestNeighbours`; attributes as its arguments."""

    model_class = NearestNeighbours

    num_neighbours: PositiveInt = 8
    max_fit_rows: PositiveInt = 200_000
    base: BaseKind = "linear"
    normalize: bool = True


class TreesConfig(ModelConfig):
    """Config of `GradientBoostedTrees`; attributes as its arguments, the recipe's seed among them."""

    model_class = GradientBoostedTrees

    max_iter: PositiveInt = 300
    tree_learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    max_leaf_nodes: Annotated[int, Field(ge=2)] = 31
    min_samples_leaf: PositiveInt = 20
    max_fit_rows: PositiveInt = 200_000
    base: BaseKind = "linear"
    normalize: bool = True

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the model, the recipe's seed among them."""
        own = super().arguments()
        own["learning_rate"] = own.pop("tree_learning_rate")
        return {**own, "seed": self.training.seed}


class OracleConfig(ModelConfig):
    """Config of `PhysicalOracle`.

    Attributes:
        env_id: Gymnasium id of the task; null for the one that the dataset was recorded in.
        env_kwargs: arguments of the task.
    """

    model_class = PhysicalOracle

    env_id: str | None = None
    env_kwargs: dict[str, Any] = Field(default_factory=dict)

    def for_recording(self, recording: Mapping[str, Any]) -> ModelConfig:
        """Return this config with the task that the recording names, unless one is given."""
        if self.env_id is not None or not recording.get("env_id"):
            return self
        kwargs = json.loads(recording.get("env_kwargs") or "{}")
        return self.replace(env_id=str(recording["env_id"]), env_kwargs=kwargs)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the model.

        Raises:
            ConfigError: when there is no task.
        """
        if self.env_id is None:
            raise ConfigError("PhysicalOracle needs the simulator of the recording, which names none; set env_id")
        return super().arguments()


TARGETS: dict[str, type[ModelConfig]] = {
    "invdyn.models.FlowInverseDynamics": FlowConfig,
    "invdyn.models.MLPRegression": MLPRegressionConfig,
    "invdyn.models.LinearInverse": LinearConfig,
    "invdyn.models.GaussianRegression": GaussianConfig,
    "invdyn.models.MixtureDensity": MixtureConfig,
    "invdyn.models.NearestNeighbours": NearestNeighboursConfig,
    "invdyn.models.GradientBoostedTrees": TreesConfig,
    "invdyn.models.PhysicalOracle": OracleConfig,
    "dynamics.inverse.learned_inverse_dynamics.FlowInverseDynamics": FlowConfig,
}


def parse_model_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Validate plain values as the config that their `_target_` picks.

    Raises:
        ConfigError: naming `where`, the key, and the nearest known name where a key or `_target_` is unknown.
    """
    if TARGET_KEY not in values:
        raise ConfigError(f"{where}: required key '{TARGET_KEY}' is missing; known names: {', '.join(TARGETS)}")
    target = values[TARGET_KEY]
    if not isinstance(target, str) or target not in TARGETS:
        raise ConfigError(f"{where}: {TARGET_KEY} must name a model, got {target!r}; {nearest(str(target), TARGETS)}")
    return validate(TARGETS[target], values, where)


def load_model_config(path: str | Path, overrides: Iterable[str] = ()) -> ModelConfig:
    """Load a YAML file as a model config, with `key.path=value` overrides applied first.

    Raises:
        ConfigError: when the file cannot be read, or as in `parse_model_config`.
    """
    return parse_model_config(apply_overrides(read_yaml(path), overrides), where=str(path))


def build_model(
    config: ModelConfig, state_dim: int, action_dim: int, history: int = 0, horizon: int = 1
) -> InverseDynamics:
    """Build the model of a config for the dimensions of a dataset; seed torch first for the same weights again."""
    return config.build(state_dim, action_dim, history, horizon)
