"""Which solver and how many steps: the cheapest that is as good as the best, judged on validation rows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.evaluation.metrics import crps, energy_scores, flat_actions, nrmse
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting, network_evaluations

NUM_SAMPLES = 19
"""A right model's action lies between the lowest and the highest of them with probability 18 / 20: a 90% interval."""

TOLERANCE = 0.002
"""Of the energy score. Wider would take a four-step solution for the curves of a two-branch problem: its force is three
times as wrong, its energy score 1% higher."""

CALIBRATED_TOLERANCE = 0.1
"""Of the energy score: what a setting may cost whose intervals hold the action as often as they say."""

NOISE_ERRORS = 2.0
LEVEL = 0.9
SPREAD_TOLERANCE = 0.01
COVERAGE_TOLERANCE = 0.01
SPREADS = tuple(1.06**power for power in range(-40, 25))

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
        spread: calibrated factor on the spread of samples, per target dimension.
        coverage_90: share of recorded numbers inside central 90% intervals of the calibrated samples.
        coverage_error: standard error of that share for a right model.
    """

    solver: str
    num_inference_steps: int
    network_evaluations: int
    nrmse: float
    energy_score: float
    energy_excess: float
    excess_error: float
    us_per_action: float
    spread: tuple[float, ...]
    coverage_90: float
    coverage_error: float

    @property
    def setting(self) -> SamplingSetting:
        """The solver and its steps."""
        return SamplingSetting(self.solver, self.num_inference_steps)


@torch.no_grad()
def quality_of_settings(
    model: FlowInverseDynamics,
    rows: dict[str, Tensor],
    std: Float[np.ndarray, " target"],
    settings: Sequence[SamplingSetting] = CANDIDATES,
    seed: int = 0,
    *,
    calibrate: bool = True,
) -> list[SettingQuality]:
    """Evaluate a flow with each setting on the same rows and the same noise, its spread calibrated for the setting.

    The spread that a flow learns is that of training rows and of weights that moved; few or many solver steps distort
    it in their own ways. So samples are stretched about their mean, which one Euler step gives.

    Args:
        model: in eval mode; unchanged.
        rows: state, action and next_state, physical, on the model's device.
        std: (target_dim,) of the training actions; NaN where constant.
        settings: solvers and steps.
        seed: of the noise.
        calibrate: False to judge the model's own spread.
    """
    truth = flat_actions(rows["action"].cpu().numpy())
    generator = torch.Generator(model.device).manual_seed(seed)
    noise = torch.randn(NUM_SAMPLES, len(truth), model.target_dim, generator=generator, device=model.device)
    context, target = model.encode(rows["state"], rows["action"], rows["next_state"])
    recorded = target.cpu().numpy()
    base = model.encode_transition(rows["state"], rows["next_state"])[1]
    kept, model.spreads = model.spreads, {}
    try:
        mean = model._targets_from_noise(context, noise, 1, "euler")
        drawn = [_draw(model, context, noise, setting) for setting in settings]
    finally:
        model.spreads = kept
    found = []
    for samples, seconds in drawn:
        spread = _best_spreads(samples, mean, target) if calibrate else torch.ones_like(target[0])
        stretched = torch.lerp(mean, samples, spread)
        actions = np.stack([flat_actions(action) for action in model.decode(stretched, base).cpu().numpy()])
        found.append((actions, seconds, tuple(spread.tolist()), _coverage(stretched.cpu().numpy(), recorded)))
    scores = [energy_scores(actions, truth, std) for actions, *_ in found]
    best = scores[int(np.argmin([score.mean() for score in scores]))]
    return [
        SettingQuality(
            solver=setting.solver,
            num_inference_steps=setting.num_inference_steps,
            network_evaluations=network_evaluations(setting),
            nrmse=nrmse(actions[0], truth, std),
            energy_score=float(score.mean()),
            energy_excess=float((score - best).mean()),
            excess_error=float((score - best).std() / np.sqrt(len(score))),
            us_per_action=1e6 * seconds / (NUM_SAMPLES * len(truth)),
            spread=spread,
            coverage_90=coverage,
            coverage_error=_coverage_error(len(truth)),
        )
        for setting, (actions, seconds, spread, coverage), score in zip(settings, found, scores, strict=True)
    ]


def choose_setting(curve: Sequence[SettingQuality]) -> SamplingSetting:
    """Return the cheapest setting that is as good as the best, among those whose intervals are right.

    Intervals are right where they hold 90%, give or take 1% and two standard errors; of settings that score far worse
    than the best (10%), none is taken for it. Where no setting's are right, those that come nearest count.
    """
    best = min(curve, key=lambda q: q.energy_score)
    near = [q for q in curve if q.energy_excess <= _slack(q, CALIBRATED_TOLERANCE * best.energy_score)]
    nearest = min(map(_coverage_gap, near))
    right = [q for q in near if _coverage_gap(q) <= max(nearest, COVERAGE_TOLERANCE) + NOISE_ERRORS * q.coverage_error]
    best = min(right, key=lambda q: q.energy_score)
    gap = [q.energy_score - best.energy_score for q in right]
    good = [q for q, more in zip(right, gap, strict=True) if more <= _slack(q, TOLERANCE * best.energy_score)]
    return min(good, key=lambda q: (q.network_evaluations, q.energy_score)).setting


def _coverage_gap(quality: SettingQuality) -> float:
    return abs(quality.coverage_90 - LEVEL)


def _coverage_error(num_rows: int) -> float:
    return math.sqrt(LEVEL * (1 - LEVEL) / num_rows)


def _slack(quality: SettingQuality, tolerance: float) -> float:
    return max(tolerance, NOISE_ERRORS * quality.excess_error)


def _best_spreads(
    samples: Float[Tensor, "samples rows target"],
    mean: Float[Tensor, "samples rows target"],
    target: Float[Tensor, "rows target"],
) -> Float[Tensor, " target"]:
    """Return the factor on the samples' distance from their mean of each dimension.

    It is the one whose 90% intervals come nearest to holding 90%, of those whose continuous ranked probability score is
    within 1% (or noise) of the lowest; 1 where neither is proven wrong.
    """
    centre, off, truth = (values.double().cpu().numpy() for values in (mean, samples - mean, target))
    best = [_best_spread(centre[..., dim], off[..., dim], truth[:, dim]) for dim in range(truth.shape[1])]
    return torch.tensor(best, dtype=samples.dtype, device=samples.device)


def _best_spread(
    mean: Float[np.ndarray, "samples rows"],
    off: Float[np.ndarray, "samples rows"],
    truth: Float[np.ndarray, " rows"],
) -> float:
    stretched = [mean + factor * off for factor in SPREADS]
    scores = np.stack([crps(each[..., None], truth[:, None])[:, 0] for each in stretched])
    best = scores[int(scores.mean(axis=1).argmin())]
    noise = NOISE_ERRORS * (scores - best).std(axis=1) / np.sqrt(len(truth))
    near = (scores - best).mean(axis=1) <= np.maximum(SPREAD_TOLERANCE * best.mean(), noise)
    gaps = np.array([abs(_coverage(each, truth) - LEVEL) for each in stretched])
    own = SPREADS.index(1.0)
    if near[own] and gaps[own] <= NOISE_ERRORS * _coverage_error(len(truth)):
        return 1.0
    gaps = np.where(near, gaps, np.inf)
    return 1.0 if gaps[own] == gaps.min() else SPREADS[int(gaps.argmin())]


def _coverage(samples: Float[np.ndarray, "samples *values"], truth: Float[np.ndarray, "*values"]) -> float:
    """Return the share of values that lie between the lowest and the highest of their samples."""
    return float(np.mean((samples.min(axis=0) <= truth) & (truth <= samples.max(axis=0))))


def _draw(
    model: FlowInverseDynamics,
    context: Float[Tensor, "rows context"],
    noise: Float[Tensor, "samples rows target"],
    setting: SamplingSetting,
) -> tuple[Float[Tensor, "samples rows target"], float]:
    """Return targets and the seconds that they took."""
    started = time.perf_counter()
    drawn = model._targets_from_noise(context, noise, setting.num_inference_steps, setting.solver)
    if drawn.is_cuda:
        torch.cuda.synchronize()
    return drawn, time.perf_counter() - started
