"""Which solver and how many steps: the cheapest that is as good as the best, judged on validation rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.evaluation.metrics import energy_scores, flat_actions, nrmse
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting
from invdyn.models.solvers import get_solver

NUM_SAMPLES = 8
TOLERANCE = 0.005
"""Of the energy score. Wider would take a four-step solution for the curves of a two-branch problem: its force is three
times as wrong, its energy score 1% higher."""

NOISE_ERRORS = 2.0
SPREADS = tuple(float(spread) for spread in np.geomspace(0.5, 2.0, 25))

CANDIDATES = (
    SamplingSetting("euler", 1),
    SamplingSetting("angular_euler", 1),
    SamplingSetting("euler", 2),
    SamplingSetting("angular_euler", 2),
    SamplingSetting("euler", 4),
    SamplingSetting("angular_euler", 4),
    SamplingSetting("angular_midpoint", 2),
    SamplingSetting("angular_midpoint", 4),
    SamplingSetting("angular_midpoint", 8),
    SamplingSetting("angular_midpoint", 16),
)
"""Cheapest first."""

CALIBRATION = SamplingSetting("angular_midpoint", 8)
"""Fine enough that the spread is the model's own."""


@dataclass(frozen=True)
class SettingQuality:
    """What a solver with a number of steps gives and costs.

    Attributes:
        solver: its name.
        num_inference_steps: its steps.
        network_evaluations: per sample.
        nrmse: RMSE / std(action) of one sample.
        energy_score: of `NUM_SAMPLES` samples, in std(action).
        energy_excess: over the best setting's energy score.
        excess_error: standard error of that excess: both saw the same rows and the same noise.
        us_per_action: wall time, in microseconds, of drawing `NUM_SAMPLES` samples for all rows at once.
    """

    solver: str
    num_inference_steps: int
    network_evaluations: int
    nrmse: float
    energy_score: float
    energy_excess: float
    excess_error: float
    us_per_action: float

    @property
    def setting(self) -> SamplingSetting:
        """The solver and its steps."""
        return SamplingSetting(self.solver, self.num_inference_steps)


def quality_of_settings(
    model: FlowInverseDynamics,
    rows: dict[str, Tensor],
    std: Float[np.ndarray, " target"],
    settings: Sequence[SamplingSetting] = CANDIDATES,
    seed: int = 0,
) -> list[SettingQuality]:
    """Evaluate a flow with each setting on the same rows and the same noise.

    Args:
        model: in eval mode.
        rows: state, action and next_state, physical, on the model's device.
        std: (target_dim,) of the training actions; NaN where constant.
        settings: solvers and steps.
        seed: of the noise.
    """
    truth = flat_actions(rows["action"].cpu().numpy())
    drawn = [_draw(model, rows, setting, seed) for setting in settings]
    scores = [energy_scores(samples, truth, std) for samples, _ in drawn]
    best = scores[int(np.argmin([score.mean() for score in scores]))]
    return [
        SettingQuality(
            solver=setting.solver,
            num_inference_steps=setting.num_inference_steps,
            network_evaluations=setting.num_inference_steps * get_solver(setting.solver).evaluations_per_step,
            nrmse=nrmse(samples[0], truth, std),
            energy_score=float(score.mean()),
            energy_excess=float((score - best).mean()),
            excess_error=float((score - best).std() / np.sqrt(len(score))),
            us_per_action=1e6 * seconds / (NUM_SAMPLES * len(truth)),
        )
        for setting, (samples, seconds), score in zip(settings, drawn, scores, strict=True)
    ]


def choose_setting(curve: Sequence[SettingQuality]) -> SamplingSetting:
    """Return the setting with the fewest network evaluations within tolerance and noise of the best energy score."""
    best = min(quality.energy_score for quality in curve)
    good = [q for q in curve if q.energy_excess <= max(TOLERANCE * best, NOISE_ERRORS * q.excess_error)]
    return min(good, key=lambda q: (q.network_evaluations, q.energy_score)).setting


def calibrate_spread(model: FlowInverseDynamics, rows: dict[str, Tensor], seed: int = 0) -> None:
    """Set the spread of an "mlp" base to what scores best per dimension on validation rows.

    The spread is learned beside a mean that keeps improving and is averaged over steps in the end, on rows that the
    mean has seen: it is too wide where training ended early, and too narrow where rows were few.

    Args:
        model: changed in place; nothing happens without an "mlp" base.
        rows: as in `quality_of_settings`.
        seed: of the noise.
    """
    if model.conditional is None:
        return
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        context, target = model.encode(rows["state"], rows["action"], rows["next_state"])
        mean = model.conditional(context).mean
        model.residual_spread.fill_(1.0)
        noise = torch.randn(NUM_SAMPLES, *target.shape, generator=generator, device=model.device)
        samples = model._targets_from_noise(context, noise, CALIBRATION.num_inference_steps, CALIBRATION.solver)
    residuals, errors = ((values - mean).double().cpu().numpy() for values in (samples, target))
    for dim in range(target.shape[1]):
        model.residual_spread[dim] = _best_spread(residuals[..., dim], errors[:, dim])


def _best_spread(residuals: Float[np.ndarray, "samples rows"], errors: Float[np.ndarray, " rows"]) -> float:
    """Return the factor on the residuals with the lowest continuous ranked probability score; 1 within its noise."""
    scores = np.stack([_crps(spread * residuals, errors) for spread in (1.0, *SPREADS)])
    best = int(scores.mean(axis=1).argmin())
    gain = scores[0] - scores[best]
    proven = gain.mean() > NOISE_ERRORS * gain.std() / np.sqrt(len(gain))
    return (1.0, *SPREADS)[best] if proven else 1.0


def _crps(samples: Float[np.ndarray, "samples rows"], truth: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    return energy_scores(samples[..., None], truth[:, None], np.ones(1))


@torch.no_grad()
def _draw(
    model: FlowInverseDynamics, rows: dict[str, Tensor], setting: SamplingSetting, seed: int
) -> tuple[Float[np.ndarray, "samples rows target"], float]:
    """Return flat samples in float64 and the seconds that they took."""
    generator = torch.Generator(model.device).manual_seed(seed)
    started = time.perf_counter()
    drawn = model.sample(
        rows["state"],
        rows["next_state"],
        NUM_SAMPLES,
        num_inference_steps=setting.num_inference_steps,
        solver=setting.solver,
        generator=generator,
        allow_unvalidated=True,
    ).cpu()
    seconds = time.perf_counter() - started
    return np.stack([flat_actions(sample) for sample in drawn.numpy()]), seconds
