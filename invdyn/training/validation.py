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
        picked = store.load_spread("val", config.val_rows, columns=("state", "action", "next_state"))
        rows = {name: torch.from_numpy(values).to(device) for name, values in picked.items()}
        std = varying_std(store.moments, slice(model.context_dim, None))
        return cls(rows, encode_rows(model, picked, device), std, config.training.seed)

    @torch.no_grad()
    def evaluate(self, model: InverseDynamics) -> dict[str, float]:
        """Return val_loss and, in units of the action's standard deviation, val_nrmse of one sample.

        As long as a flow is not trained yet (stage 0 of two), the sample is the mean of its base: one Euler step.
        """
        count = len(self.encoded[0])
        if count == 0:
            return {}
        generator = epoch_generator(self.seed, 0, VALIDATION_STREAM, model.device)
        loss = model.encoded_loss(*self.encoded, model.draw_noise(count, generator, model.device))
        mean = {"num_inference_steps": 1, "solver": "euler"} if model.stage < model.num_stages - 1 else {}
        sampled = model.sample(self.rows["state"], self.rows["next_state"], generator=generator, **mean)[0]  # type: ignore[arg-type]
        predicted, recorded = (flat_actions(values.cpu().numpy()) for values in (sampled, self.rows["action"]))
        return {SELECTION_METRIC: float(loss), "val_nrmse": nrmse(predicted, recorded, self.action_std)}
