"""Baseline: gradient-boosted trees, fitted by scikit-learn and kept as plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from invdyn.errors import ConfigError
from invdyn.models.base import BaseKind, Noise
from invdyn.models.fitted import FittedModel, chunks_of

_CHUNK_ELEMENTS = 2**22


class GradientBoostedTrees(FittedModel):
    """Least-squares regression of each target by `HistGradientBoostingRegressor`: one action per transition.

    A checkpoint holds the nodes of all trees as arrays, so predicting needs no scikit-learn, and nothing is unpickled.
    Until it is fitted, it is one leaf of value 0.

    Args:
        state_dim: size of one state.
        action_dim: size of one action.
        max_iter: trees per target, at most: boosting stops when held-out rows no longer improve.
        learning_rate: shrinkage of each tree.
        max_leaf_nodes: leaves per tree.
        min_samples_leaf: rows per leaf.
        max_fit_rows: training rows to fit at most, evenly spaced.
        seed: of the held-out rows.
        base: "linear" to regress the whitened residual of the ridge solution.
        normalize: standardise the features and targets.
        history: number of past states.
        horizon: number of actions predicted.
    """

    is_point = True
    learned_buffers = ("feature", "threshold", "branches", "value")
    feature: Tensor
    threshold: Tensor
    branches: Tensor
    value: Tensor
    depth: Tensor
    baseline: Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        *,
        max_iter: int = 300,
        learning_rate: float = 0.1,
        max_leaf_nodes: int = 31,
        min_samples_leaf: int = 20,
        max_fit_rows: int = 200_000,
        seed: int = 0,
        base: BaseKind = "linear",
        normalize: bool = True,
        history: int = 0,
        horizon: int = 1,
    ) -> None:
        super().__init__(state_dim, action_dim, history=history, horizon=horizon, base=base, normalize=normalize)
        self.max_fit_rows = max_fit_rows
        self.options = {
            "max_iter": max_iter,
            "learning_rate": learning_rate,
            "max_leaf_nodes": max_leaf_nodes,
            "min_samples_leaf": min_samples_leaf,
            "random_state": seed,
        }
        # (targets, trees, nodes): feature and threshold of a node, the nodes below it (of a leaf: itself), its value.
        shape = (self.target_dim, 1, 1)
        self.register_buffer("feature", torch.zeros(shape, dtype=torch.long))
        self.register_buffer("threshold", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("branches", torch.zeros((*shape, 2), dtype=torch.long))
        self.register_buffer("value", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("depth", torch.zeros((), dtype=torch.long))
        self.num_levels = 0  # `depth` as a number: a program is exported without the values of its tensors
        self.register_buffer("baseline", torch.zeros(self.target_dim, dtype=torch.float64))

    @override
    def fit(self, context: Float[Tensor, "rows context"], target: Float[Tensor, "rows target"]) -> None:
        """Boost trees for one target after the other.

        Raises:
            ConfigError: when scikit-learn is not installed.
        """
        features = context.cpu().numpy()
        self.adopt([self.regressor().fit(features, column) for column in target.cpu().numpy().T])

    def regressor(self) -> Any:
        """Return scikit-learn's unfitted regressor of one target.

        Raises:
            ConfigError: when scikit-learn is not installed.
        """
        try:
            from sklearn.ensemble import HistGradientBoostingRegressor
        except ImportError:
            raise ConfigError(
                "gradient-boosted trees need scikit-learn to be fitted; pip install 'invdyn[trees]'"
            ) from None
        return HistGradientBoostingRegressor(**self.options)

    def adopt(self, regressors: list[Any]) -> None:
        """Take over the trees of fitted regressors, one per target."""
        trees = [[stage[0].nodes for stage in regressor._predictors] for regressor in regressors]
        num_trees, num_nodes = max(map(len, trees)), max(len(nodes) for one in trees for nodes in one)
        shape = (len(trees), num_trees, num_nodes)
        feature, threshold, value = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
        branches = np.broadcast_to(np.arange(num_nodes)[:, None], (*shape, 2)).copy()  # what is no node is a leaf of 0
        for target, one in enumerate(trees):
            for tree, nodes in enumerate(one):
                place, inner = (target, tree, slice(len(nodes))), nodes["is_leaf"] == 0
                feature[place], value[place] = nodes["feature_idx"], np.where(inner, 0.0, nodes["value"])
                threshold[place] = nodes["num_threshold"]
                both = np.stack([nodes["left"], nodes["right"]], axis=1).astype(np.int64)
                branches[place] = np.where(inner[:, None], both, branches[place])
        depth = max(int(nodes["depth"].max()) for one in trees for nodes in one)
        baseline = np.array([float(np.squeeze(regressor._baseline_prediction)) for regressor in regressors])
        for name, array in {
            "feature": feature,
            "threshold": threshold,
            "branches": branches,
            "value": value,
            "depth": np.array(depth),
            "baseline": baseline,
        }.items():
            setattr(self, name, torch.from_numpy(array).to(self.device))
        self.num_levels = depth

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.num_levels = int(self.depth)

    def predict(self, context: Float[Tensor, "batch context"]) -> Float[Tensor, "batch target"]:
        """Return the targets, float64: from the root of every tree, go left where feature <= threshold."""
        chunks = chunks_of(context, _CHUNK_ELEMENTS // self.feature[..., 0].numel())
        return torch.cat([self._predict_chunk(chunk.double()) for chunk in chunks])

    @override
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the mean squared error; `noise` is empty."""
        return functional.mse_loss(self.predict(context).float(), target)

    @override
    def _targets_from_noise(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        return self.predict(context).float().expand(noise.shape[0], -1, -1)

    def _predict_chunk(self, context: Float[Tensor, "batch context"]) -> Float[Tensor, "batch target"]:
        """Walk all trees of all targets one level at a time."""
        targets, trees, nodes = self.feature.shape
        feature, threshold = self.feature.flatten(), self.threshold.flatten()
        branches, value = self.branches.flatten(0, 2), self.value.flatten()
        root = torch.arange(targets * trees, device=context.device) * nodes
        node = root.expand(context.shape[0], -1)
        for _ in range(self.num_levels):
            goes_right = context.gather(1, feature[node]) > threshold[node]
            node = root + branches[node, goes_right.long()]
        leaves: Tensor = value[node].unflatten(1, (targets, trees))
        return self.baseline + leaves.sum(dim=2)
