from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invdyn.config import read_yaml
from invdyn.errors import ConfigError
from invdyn.models import (
    FlowInverseDynamics,
    GaussianRegression,
    GradientBoostedTrees,
    LinearInverse,
    MixtureDensity,
    MLPRegression,
    NearestNeighbours,
    TrainingRecipe,
    build_model,
    load_model_config,
    parse_model_config,
)
from invdyn.models.registry import TARGETS, FlowConfig

LEGACY = {
    "name": "flow_inverse_dynamics",
    "_target_": "dynamics.inverse.learned_inverse_dynamics.FlowInverseDynamics",
    "diffusion_step_embed_dim": 16,
    "down_dims": [16, 32, 64],
    "num_inference_steps": 100,
    "device": "cuda:0",
}


def test_configs_with_the_legacy_keys_load_as_they_are() -> None:
    config = parse_model_config(LEGACY, where="here")
    assert isinstance(config, FlowConfig)
    assert (config.name, config.device, config.num_inference_steps) == ("flow_inverse_dynamics", "cuda:0", 100)
    assert config.training == TrainingRecipe()
    model = build_model(config, state_dim=4, action_dim=1)
    assert isinstance(model, FlowInverseDynamics)
    assert model.num_inference_steps == 100
    assert sum(parameter.numel() for parameter in model.parameters()) == 43_609


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "auto", None])
def test_devices(device: str | None) -> None:
    assert parse_model_config({**LEGACY, "device": device}, where="here").device == device


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("flow", FlowInverseDynamics),
        ("many_valued_flow", FlowInverseDynamics),
        ("pendulum_flow", FlowInverseDynamics),
        ("reference_flow", FlowInverseDynamics),
        ("legacy_flow", FlowInverseDynamics),
        ("mlp", MLPRegression),
        ("mlp_plain", MLPRegression),
        ("linear", LinearInverse),
        ("gaussian", GaussianRegression),
        ("mixture", MixtureDensity),
        ("nearest_neighbours", NearestNeighbours),
        ("trees", GradientBoostedTrees),
    ],
)
def test_the_configs_of_the_repository(repository: Path, name: str, model: type) -> None:
    config = load_model_config(repository / "configs" / "inverse_dynamics" / f"{name}.yaml")
    assert config.name == name
    built = build_model(config, 4, 1, history=1, horizon=2)
    assert type(built) is model
    assert (built.state_dim, built.action_dim, built.history, built.horizon) == (4, 1, 1, 2)


def test_every_config_of_the_repository_is_tested(repository: Path) -> None:
    names = {path.stem for path in (repository / "configs" / "inverse_dynamics").glob("*.yaml")}
    (mark,) = test_the_configs_of_the_repository.pytestmark  # type: ignore[attr-defined]
    assert names == {name for name, _ in mark.args[1]} | {"oracle"}  # the oracle has tests of its own


def test_the_reference_recipe_is_exact(repository: Path) -> None:
    config = load_model_config(repository / "configs" / "inverse_dynamics" / "reference_flow.yaml")
    assert isinstance(config, FlowConfig)
    assert (config.network, config.prediction, config.base, config.normalize) == ("unet", "velocity", "none", False)
    assert (config.num_inference_steps, config.solver) == (100, "euler")
    recipe = config.training
    assert (recipe.batch_size, recipe.learning_rate, recipe.schedule) == (64, 1e-3, "constant")
    assert (recipe.warmup_fraction, recipe.ema_decay, recipe.weight_decay, recipe.max_grad_norm) == (0, None, 0, None)
    model = build_model(config, 4, 1)
    state, action, next_state = torch.randn(5, 4), torch.randn(5, 1), torch.randn(5, 4)
    context, target = model.encode(state, action, next_state)
    assert torch.equal(context, torch.cat([state, next_state], dim=1))
    assert torch.equal(target, action)


def test_values_round_trip(repository: Path) -> None:
    for path in (repository / "configs" / "inverse_dynamics").glob("*.yaml"):
        config = load_model_config(path)
        assert parse_model_config(config.to_values(), where="here") == config
        assert config.to_values()["_target_"] == read_yaml(path)["_target_"]


def test_values_rebuild_a_model_that_takes_the_weights() -> None:
    config = parse_model_config({**LEGACY, "network": "mlp", "down_dims": [8, 8]}, where="here")
    rebuilt = parse_model_config(config.to_values(), where="here")
    model = build_model(config, 3, 2, history=1, horizon=4)
    build_model(rebuilt, model.state_dim, model.action_dim, model.history, model.horizon).load_state_dict(
        model.state_dict()
    )


def test_the_gates_and_tails_of_a_recipe_reach_its_base(repository: Path) -> None:
    path = repository / "configs" / "inverse_dynamics" / "flow.yaml"
    config = load_model_config(path, ["base_gates=5", "base_tails=7.0"])
    model = build_model(config, 3, 2)
    assert isinstance(model, FlowInverseDynamics)
    assert model.largest == pytest.approx(7.0 * np.arcsinh(30.0 / 7.0))
    assert model.state_dict()["conditional.trunk.0.weight"].shape == (96 + 5, 6)


def test_overrides(repository: Path) -> None:
    path = repository / "configs" / "inverse_dynamics" / "pendulum_flow.yaml"
    config = load_model_config(path, ["down_dims=[8]", "training.batch_size=32"])
    assert isinstance(config, FlowConfig)
    assert (config.down_dims, config.training.batch_size) == ((8,), 32)
    assert config.training.schedule == "cosine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_target_": "invdyn.models.FlowInverseDynamic"}, "did you mean 'invdyn.models.FlowInverseDynamics'"),
        ({"_target_": "os.system"}, "here: _target_ must name a model, got 'os.system'; known names: .*MLPRegression"),
        ({"_target_": 3}, "_target_ must name a model, got 3"),
        ({"down_dim": [8]}, "here: unknown key 'down_dim'; did you mean 'down_dims'"),
        ({"down_dims": []}, "here: down_dims: .*at least 1 item.*"),
        ({"down_dims": [8, 0]}, r"here: down_dims.1: .*greater than 0, got 0"),
        ({"diffusion_step_embed_dim": 7}, "here: diffusion_step_embed_dim: must be even, got 7"),
        ({"num_inference_steps": 0}, "num_inference_steps: .*greater than 0"),
        ({"device": "gpu"}, "here: device: .*pattern.*got 'gpu'"),
        (
            {"solver": "heun"},
            "here: solver: .*'euler', 'midpoint', 'angular_euler', 'angular_midpoint' or 'angular_adams'",
        ),
        ({"training": {"batchsize": 3}}, "unknown key 'training.batchsize'; did you mean 'batch_size'"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate: .*greater than 0"),
        ({"training": {"ema_decay": 1.0}}, "training.ema_decay: .*less than 1"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_model_config({**LEGACY, **changes}, where="here")
    assert "\n" not in str(caught.value)


def test_a_missing_target_names_the_key() -> None:
    with pytest.raises(ConfigError, match="here: required key '_target_' is missing"):
        parse_model_config({"name": "x"}, where="here")


def test_every_name_of_the_table_builds() -> None:
    for name in TARGETS.keys() - {"invdyn.models.PhysicalOracle"}:  # which needs a simulator of these dimensions
        model = build_model(parse_model_config({"_target_": name}, where="here"), 3, 2)
        assert model.sample(torch.zeros(4, 3), torch.zeros(4, 3)).shape == (1, 4, 2)
