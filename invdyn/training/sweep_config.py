"""What a sweep YAML says: a space of model values, how long to train each, and when to give up on one."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

import numpy as np
import yaml
from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_validator

from invdyn.config import Config, apply_overrides, read_yaml, validate
from invdyn.errors import ConfigError
from invdyn.models.registry import ModelConfig, parse_model_config
from invdyn.url_path import AnyPath

SWEEP_FILE = "sweep.yaml"
STEPS_KEY = "num_inference_steps"
EPOCHS_KEY = "training.num_epochs"


class AshaConfig(Config):
    """Asynchronous successive halving: trials in the worse part at a rung end there.

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (2020).

    Attributes:
        grace_share: share of the epochs that every trial gets.
        reduction_factor: of the trials that reach a rung, one in this many goes on.
    """

    grace_share: float = Field(default=0.25, gt=0, le=1)
    reduction_factor: float = Field(default=3.0, gt=1)


class SweepConfig(Config):
    """A sweep.

    Attributes:
        name: of the sweep; W&B group and folder.
        storage: shared folder or URL of the dataset and the sweep, in place of the dataset config's.
        dataset_config: YAML of the dataset.
        model_config_file: YAML of the model that the space varies; `model_config` in YAML.
        space: key path of the model config to the list of values to try. `num_inference_steps` does not change the
            weights: every trained network is evaluated at all of its values, so that axis costs no training.
        num_trials: networks to train, drawn at random from the space; None for all combinations.
        num_epochs: of each trial; the model config's when None.
        asha: early stopping; None trains every trial to its end.
        population: networks of one shape that are trained at once, as one trial: those that differ in
            training.learning_rate, seed, schedule, warmup_fraction, weight_decay or ema_decay alone. Early stopping
            judges such a trial by its best network.
        cpus_per_trial: CPUs that a trial reserves, and its threads.
        gpus_per_trial: share of a GPU that a trial reserves where the cluster has GPUs.
        max_concurrent_trials: trials at a time; as many as fit when None.
        seed: of the draw of trials.
    """

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    storage: str | None = Field(default=None, min_length=1)
    dataset_config: str
    model_config_file: str = Field(alias="model_config")
    space: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(min_length=1)
    num_trials: PositiveInt | None = None
    num_epochs: PositiveInt | None = None
    asha: AshaConfig | None = AshaConfig()
    population: PositiveInt = 1
    cpus_per_trial: PositiveInt = 1
    gpus_per_trial: float = Field(default=0.25, gt=0)
    max_concurrent_trials: PositiveInt | None = None
    seed: int = Field(default=0, ge=0)

    @field_validator("space")
    @classmethod
    def _distinct(cls, space: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in space.items():
            if len({json.dumps(value, default=str) for value in values}) < len(values):
                raise ValueError(f"space.{key} must not repeat a value")
        if any(type(value) is not int or value < 1 for value in space.get(STEPS_KEY, ())):
            raise ValueError(f"space.{STEPS_KEY} must hold whole numbers above 0")
        return space

    @model_validator(mode="after")
    def _one_source_of_epochs(self) -> Self:
        if self.num_epochs is not None and EPOCHS_KEY in self.space:
            raise ValueError(f"num_epochs must be null where space holds {EPOCHS_KEY}: it would replace those values")
        return self

    @property
    def step_counts(self) -> tuple[int, ...] | None:
        """Step counts to evaluate every network at; None for the model config's own."""
        return tuple(self.space[STEPS_KEY]) if STEPS_KEY in self.space else None

    def network_settings(self) -> list[dict[str, Any]]:
        """Return the settings of the networks to train, in a fixed order.

        Returns:
            One mapping of key path to value per trial: all combinations, or `num_trials` of them drawn by `seed`.
        """
        axes = {key: values for key, values in self.space.items() if key != STEPS_KEY}
        combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        if self.num_trials is None or self.num_trials >= len(combinations):
            return combinations
        chosen = np.random.default_rng(self.seed).choice(len(combinations), self.num_trials, replace=False)
        return [combinations[i] for i in sorted(chosen)]


def load_sweep_config(path: str | AnyPath, overrides: list[str]) -> SweepConfig:
    """Load a sweep YAML.

    Raises:
        ConfigError: naming the file and key.
    """
    return validate(SweepConfig, apply_overrides(read_yaml(path), overrides), where=str(path))


def model_of_trial(base: ModelConfig, settings: Mapping[str, Any]) -> ModelConfig:
    """Return the model config of a trial: the base with the settings in place.

    Raises:
        ConfigError: when a key or value of the space is not the model's.
    """
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in settings.items()]
    try:
        return parse_model_config(apply_overrides(base.to_values(), overrides), where="space")
    except ConfigError as error:
        raise ConfigError(f"{error}; in space: {dict(settings)}") from None


def trial_name(index: int, settings: Mapping[str, Any]) -> str:
    """Return a trial's name: its number and its settings, safe as a folder.

    Example:
        >>> trial_name(3, {"down_dims": [16, 32], "training.learning_rate": 0.001})
        '003-down_dims-16-32-learning_rate-0.001'
    """
    words = [f"{key.rpartition('.')[2]}-{json.dumps(value)}" for key, value in settings.items()]
    slug = re.sub(r"[^\w.]+", "-", "-".join(words)).strip("-")
    return f"{index:03d}-{slug}"[:120].rstrip("-")
