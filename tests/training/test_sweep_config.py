from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from invdyn.errors import ConfigError
from invdyn.models.registry import parse_model_config
from invdyn.training.sweep_config import SweepConfig, load_sweep_config, model_of_trial, trial_name
from tests.training.runs import FLOW

SPACE = {
    "down_dims": [[8], [16, 16]],
    "diffusion_step_embed_dim": [4, 8, 16],
    "training.learning_rate": [1e-3, 1e-5],
}
STEPS = {"num_inference_steps": [1, 2, 4]}
NAMES = {"name": "small", "dataset_config": "dataset.yaml", "model_config": "model.yaml"}
BASE = parse_model_config(FLOW, where="test")


def sweep(space: dict[str, Any] = SPACE, **values: Any) -> SweepConfig:
    return SweepConfig.model_validate({**NAMES, "space": space, **values})


def load(folder: Path, overrides: list[str] | None = None, **values: Any) -> SweepConfig:
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**NAMES, "space": SPACE, **values}))
    return load_sweep_config(folder / "sweep.yaml", overrides or [])


def test_all_combinations_in_a_fixed_order() -> None:
    settings = sweep().network_settings()
    assert [tuple(each.values()) for each in settings] == list(itertools.product(*SPACE.values()))
    assert all(list(each) == list(SPACE) for each in settings)


def test_step_counts_never_multiply_the_networks() -> None:
    with_steps = sweep({**STEPS, **SPACE})
    assert with_steps.network_settings() == sweep().network_settings()
    assert with_steps.step_counts == (1, 2, 4)
    assert sweep().step_counts is None
    assert sweep(STEPS).network_settings() == [{}]


def test_a_draw_is_reproducible_distinct_and_within_the_space() -> None:
    everything = sweep().network_settings()
    drawn = sweep(num_trials=5, seed=3).network_settings()
    assert drawn == sweep(num_trials=5, seed=3).network_settings()
    assert len(drawn) == 5
    assert [each for each in everything if each in drawn] == drawn
    others = [sweep(num_trials=5, seed=seed).network_settings() for seed in range(4, 9)]
    assert any(other != drawn for other in others)
    assert sweep(num_trials=12).network_settings() == sweep(num_trials=100).network_settings() == everything


def test_the_model_key_of_a_yaml(tmp_path: Path) -> None:
    """`model_config` is pydantic's own name, so the attribute has another."""
    assert load(tmp_path).model_config_file == "model.yaml"
    assert load(tmp_path, ["model_config=other.yaml"]).model_config_file == "other.yaml"
    assert "model_config" in load(tmp_path).model_dump(by_alias=True)
    with pytest.raises(ConfigError, match=r"sweep\.yaml: required key 'model_config' is missing"):
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({k: v for k, v in NAMES.items() if k != "model_config"}))
        load_sweep_config(tmp_path / "sweep.yaml", [])


def test_what_is_saved_loads_to_the_same_sweep(tmp_path: Path) -> None:
    config = load(tmp_path, num_trials=3, asha=None, seed=9).replace(num_epochs=2)
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    assert load_sweep_config(tmp_path / "saved.yaml", []) == config
    assert config.num_trials == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {"down_dims": [[8], [16], [8]]}}, "space.down_dims must not repeat a value"),
        ({"space": {"down_dims": []}}, "space.down_dims: List should have at least 1 item"),
        ({"space": {"down_dims": 8}}, "space.down_dims: Input should be a valid list, got 8"),
        ({"space": {}}, "space: Dictionary should have at least 1 item"),
        ({"space": {"num_inference_steps": [1, 0]}}, "space.num_inference_steps must hold whole numbers above 0"),
        ({"space": {"num_inference_steps": [2.5]}}, "space.num_inference_steps must hold whole numbers above 0"),
        ({"space": {"num_inference_steps": ["four"]}}, "space.num_inference_steps must hold whole numbers above 0"),
        ({"space": {"num_inference_steps": [True]}}, "space.num_inference_steps must hold whole numbers above 0"),
        (
            {"space": {"training.num_epochs": [1, 2]}, "num_epochs": 3},
            "num_epochs must be null where space holds training.num_epochs",
        ),
        ({"num_trial": 3}, "unknown key 'num_trial'; did you mean 'num_trials'?"),
        ({"model_confg": "m.yaml"}, "unknown key 'model_confg'; did you mean 'model_config'?"),
        ({"zzz": 3}, "max_concurrent_trials, model_config, name, num_epochs"),
        ({"num_trials": 0}, "num_trials: Input should be greater than 0, got 0"),
        ({"asha": {"grace": 0.1}}, "unknown key 'asha.grace'; did you mean 'grace_share'?"),
        ({"asha": {"reduction_factor": 1}}, "asha.reduction_factor: Input should be greater than 1, got 1"),
        ({"gpus_per_trial": 0}, "gpus_per_trial: Input should be greater than 0, got 0"),
        ({"name": "a/b"}, "name: String should match pattern"),
    ],
)
def test_bad_configs_are_one_line(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **values)
    assert f"{tmp_path / 'sweep.yaml'}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_date_in_the_space_is_no_crash(tmp_path: Path) -> None:
    """YAML reads 2024-01-01 as a date, which JSON does not know."""
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(NAMES) + "space: {down_dims: [2024-01-01]}\n")
    (settings,) = load_sweep_config(tmp_path / "sweep.yaml", []).network_settings()
    with pytest.raises(ConfigError, match="space: down_dims: "):
        model_of_trial(BASE, settings)


def test_the_model_of_a_trial() -> None:
    """Values reach the model unchanged: 1e-5 must not become text on the way."""
    settings = {"down_dims": [16, 16], "diffusion_step_embed_dim": 8, "training.learning_rate": 1e-5}
    model = model_of_trial(BASE, settings).to_values()
    assert (model["down_dims"], model["diffusion_step_embed_dim"]) == ([16, 16], 8)
    assert model["training"]["learning_rate"] == 1e-5
    before = BASE.to_values()
    changed = {key for key in before if model[key] != before[key]}
    assert changed == {"diffusion_step_embed_dim", "training"}
    assert model_of_trial(BASE, {}) == BASE
    assert model_of_trial(BASE, {"training.ema_decay": None}).training.ema_decay is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"down_dim": [8]}, "space: unknown key 'down_dim'; did you mean 'down_dims'?; in space: {'down_dim': [8]}"),
        ({"training.learning_rat": 1}, "unknown key 'training.learning_rat'; did you mean 'learning_rate'?"),
        ({"diffusion_step_embed_dim": 3}, "diffusion_step_embed_dim: must be even, got 3; in space: "),
        ({"training.learning_rate": 0}, "learning_rate: Input should be greater than 0, got 0"),
        ({"down_dims.first": 1}, "'down_dims' holds [16, 16], not a mapping"),
        ({"solver": "rk4"}, "'angular_euler', 'angular_midpoint' or 'angular_adams', got 'rk4'"),
    ],
)
def test_what_is_not_the_models_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_of_trial(BASE, settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_trial_names_are_distinct_and_safe_as_folders() -> None:
    settings = [*sweep().network_settings(), {"solver": "../ä b"}, {"down_dims": [128] * 60}, {}]
    names = [trial_name(index, each) for index, each in enumerate(settings)]
    assert len(set(names)) == len(names)
    assert all(Path(name).name == name and len(name) <= 120 for name in names)
    assert names[-1] == "014"
