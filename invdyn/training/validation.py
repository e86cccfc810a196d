"""What every epoch is judged by: rows of the validation split and fixed noise."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.evaluation.metrics import flat_actions, nrmse, varying_std
from invdyn.models.base import InverseDynamics
from invdyn.training.batches import Rows, encode_rows, epoch_generator
from invdyn.training.checkpoint import SELECTION_METRIC
from invdyn.training.run_config import RunConfig
from invdyn.transitions.store import TransitionStore

VALIDATION_STREAM = 2
BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class Validation:
    """Rows of the validation split, evenly spaced, and the noise to judge every epoch by.

    Attributes:
        rows: physical columns on the device; empty where the dataset has no validation split.
        encoded: the same rows encoded.
        action_std: (target_dim,) of the train rows; NaN where an action never varies.
        seed: of the noise.
    """

    rows: dict[str, Tensor]
    encoded: Rows
    action_std: Float[np.ndarray, "target"]
    seed: int = field(default=0)

    @classmethod
    def load(
        cls, model: InverseDynamics, store: TransitionStore, config: RunConfig, device: torch.device
    ) -> Validation:
        """Read at most `config.val_rows` rows."""
        picked = read_spread_rows(store, "val", config.val_rows)
        rows = {name: torch.from_numpy(values).to(device) for name, values in picked.items()}
        std = varying_std(store.moments, slice(model.context_dim, None))
        return cls(rows, encode_rows(model, picked, device), std, config.training.seed)

    @torch.no_grad()
    def evaluate(self, model: InverseDynamics) -> dict[str, float]:
        """Return val_loss and, in units of the action's standard deviation, val_nrmse of one sample."""
        count = len(self.encoded[0])
        if count == 0:
            return {}
        generator = epoch_generator(self.seed, 0, VALIDATION_STREAM, model.device)
        loss = model.encoded_loss(*self.encoded, model.draw_noise(count, generator, model.device))
        sampled = model.sample(self.rows["state"], self.rows["next_state"], generator=generator)[0]
        predicted, recorded = (flat_actions(values.cpu().numpy()) for values in (sampled, self.rows["action"]))
        return {SELECTION_METRIC: float(loss), "val_nrmse": nrmse(predicted, recorded, self.action_std)}


def read_spread_rows(store: TransitionStore, split: str, count: int) -> dict[str, np.ndarray]:
    """Read at most `count` evenly spaced rows of a split, holding one block of it in memory at a time.

    Returns:
        state, action and next_state of the rows.
    """
    total = store.num_rows(split)
    wanted = np.linspace(0, max(total - 1, 0), min(total, count)).astype(np.int64)
    if len(wanted) == 0:
        return store.load(split, columns=("state", "action", "next_state"))
    found = []
    start = 0
    for part in store.parts(split):
        for first in range(0, part.rows, BLOCK_ROWS):
            stop = min(first + BLOCK_ROWS, part.rows)
            inside = wanted[(wanted >= start + first) & (wanted < start + stop)] - start - first
            if len(inside):
                block = store.read_rows(part, first, stop)
                found.append({name: values[inside] for name, values in block.items()})
        start += part.rows
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}
