"""Inverse dynamics models: p(action | state, next_state) behind one interface."""

from invdyn.models.base import InverseDynamics
from invdyn.models.flow import FlowInverseDynamics
from invdyn.models.gradient_boosted_trees import GradientBoostedTrees
from invdyn.models.linear import LinearInverse
from invdyn.models.mixture_density import GaussianRegression, MixtureDensity
from invdyn.models.mlp_regression import MLPRegression
from invdyn.models.nearest_neighbours import NearestNeighbours
from invdyn.models.physical_oracle import PhysicalOracle
from invdyn.models.recipe import TrainingRecipe
from invdyn.models.registry import ModelConfig, build_model, load_model_config, parse_model_config

__all__ = [
    "FlowInverseDynamics",
    "GaussianRegression",
    "GradientBoostedTrees",
    "InverseDynamics",
    "LinearInverse",
    "MLPRegression",
    "MixtureDensity",
    "ModelConfig",
    "NearestNeighbours",
    "PhysicalOracle",
    "TrainingRecipe",
    "build_model",
    "load_model_config",
    "parse_model_config",
]
