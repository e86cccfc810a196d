"""Inverse dynamics models: p(action | state, next_state) behind one interface."""

from invdyn.models.base import InverseDynamics
from invdyn.models.flow import FlowInverseDynamics
from invdyn.models.linear import LinearInverse
from invdyn.models.mlp_regression import MLPRegression
from invdyn.models.recipe import TrainingRecipe
from invdyn.models.registry import ModelConfig, build_model, load_model_config, parse_model_config

__all__ = [
    "FlowInverseDynamics",
    "InverseDynamics",
    "LinearInverse",
    "MLPRegression",
    "ModelConfig",
    "TrainingRecipe",
    "build_model",
    "load_model_config",
    "parse_model_config",
]
