"""Models that are fitted to rows at once, not trained by gradient steps."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.models.base import InverseDynamics


class FittedModel(InverseDynamics):
    """A model that `fit` completes, after `fit_normalization`.

    Its learned buffers take the sizes of the data, so a state dict decides them when it is loaded.

    Attributes:
        max_fit_rows: training rows that `fit` should be given at most.
        learned_buffers: names of the buffers that `fit` sets.
    """

    trainable = False
    learned_buffers: ClassVar[tuple[str, ...]] = ()
    max_fit_rows: int

    @abstractmethod
    def fit(self, context: Float[Tensor, "rows context"], target: Float[Tensor, "rows target"]) -> None:
        """Fit to encoded training rows, at least one; both from `encode`."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.learned_buffers:
            stored = state_dict.get(prefix + name)
            if isinstance(stored, Tensor) and stored.dim() == getattr(self, name).dim():
                setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def chunks_of(context: Float[Tensor, "batch context"], num_rows: int) -> tuple[Tensor, ...]:
    """Return the rows in chunks that bound the memory of a prediction; all at once in an exported program.

    A program's batch is free, so it cannot hold a chunk for each part of one.

    Args:
        context: encoded rows.
        num_rows: of a chunk, at most.
    """
    return (context,) if torch.compiler.is_exporting() else context.split(max(1, num_rows))
