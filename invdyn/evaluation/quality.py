"""Quality against cost: one trained flow at several numbers of solver steps, on the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from invdyn.evaluation.metrics import energy_score, flat_actions, nrmse, varying_std
from invdyn.evaluation.speed import LARGE_BATCH, measure_speed
from invdyn.models.base import InverseDynamics
from invdyn.transitions.store import TransitionStore

NUM_SAMPLES = 8


@dataclass(frozen=True)
class StepQuality:
    """What a number of steps gives and costs.

    Attributes:
        num_inference_steps: solver steps.
        nrmse: RMSE / std(action) of one sample.
        energy_score: of `NUM_SAMPLES` samples, in std(action).
        us_per_action: wall time at batch 1,000, in microseconds.
    """

    num_inference_steps: int
    nrmse: float
    energy_score: float
    us_per_action: float


def quality_by_steps(
    model: InverseDynamics,
    store: TransitionStore,
    step_counts: Sequence[int],
    *,
    split: str = "val",
    max_rows: int = 4096,
    seed: int = 0,
) -> list[StepQuality]:
    """Evaluate a model at each step count on the same rows and the same noise.

    Args:
        model: in eval mode.
        store: the dataset.
        step_counts: solver steps.
        split: which rows.
        max_rows: at most this many, evenly spaced.
        seed: of the noise.
    """
    columns = store.load_spread(split, max_rows, columns=("state", "action", "next_state"))
    if len(columns["state"]) == 0:
        return []
    state, next_state = (torch.from_numpy(columns[name]).to(model.device) for name in ("state", "next_state"))
    action = flat_actions(columns["action"])
    std = varying_std(store.moments, slice(model.context_dim, None))
    repeated = torch.arange(LARGE_BATCH) % len(state)

    def predict(steps: int, batch: int) -> object:
        rows = repeated[:batch].to(model.device)
        return model.sample(state[rows], next_state[rows], num_inference_steps=steps, allow_unvalidated=True)

    speeds = measure_speed({str(n): lambda batch, n=n: predict(n, batch) for n in step_counts}, model.device)  # type: ignore[misc]
    result = []
    for steps in step_counts:
        generator = torch.Generator(model.device).manual_seed(seed)
        drawn = model.sample(
            state, next_state, NUM_SAMPLES, num_inference_steps=steps, generator=generator, allow_unvalidated=True
        )
        samples = np.stack([flat_actions(sample) for sample in drawn.cpu().numpy()])
        result.append(
            StepQuality(
                num_inference_steps=steps,
                nrmse=nrmse(samples[0], action, std),
                energy_score=energy_score(samples, action, std),
                us_per_action=1e6 / speeds[str(steps)].actions_per_s,
            )
        )
    return result
