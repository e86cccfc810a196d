"""Which solver and how many steps: the cheapest that is as good as the best, judged on validation rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.errors import TrainingDiverged
from invdyn.evaluation.calibration import density_levels
from invdyn.evaluation.metrics import crps, energy_scores, expected_energy_scores, flat_actions, nrmse
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting, network_evaluations

NUM_SAMPLES = 19
"""A right model's action ranks among them as one of 20: at 18 of the ranks a 90% region holds it."""

EXCESS_EXPONENT = 0.5
"""Of distances, where a setting is compared with the best: a thin target that is missed by a little, as between two
branches, shows ten times as clearly as at 1."""

TOLERANCE = 0.001
"""Share that the score with that exponent may be above the best setting's."""

CALIBRATED_TOLERANCE = 0.1
"""Of the energy score: what a setting may cost whose regions hold the action as often as they say."""

NOISE_ERRORS = 2.0
PROVEN_ERRORS = 2.5
"""Standard errors that prove a spread wrong: several of them are tested."""

LAST_ERRORS = 1.5
"""The same of the last calibration, which tests once: with more, regions that were too small stay so."""

LEVEL = 0.9
SPREAD_TOLERANCE = 0.01
COVERAGE_TOLERANCE = 0.01
SPREADS = tuple(1.06**power for power in range(-40, 25))
STRIDE = 4
REGION_STEP, MAX_REGION_STEPS = 1.015, 16
"""All dimensions are stretched together by at most 1.015^16 = 1.27."""

CANDIDATES = (
    SamplingSetting("euler", 1),
    SamplingSetting("angular_euler", 1),
    SamplingSetting("euler", 2),
    SamplingSetting("angular_adams", 2),
    SamplingSetting("euler", 4),
    SamplingSetting("angular_adams", 4),
    SamplingSetting("angular_adams", 16),
    SamplingSetting("angular_adams", 32),
)
"""Cheapest first. 8 steps are left out: no score tells them from 16 on two branches, but the forces that they imply are
twice as wrong (docs/flow.md)."""


@dataclass(frozen=True)
class SettingQuality:
    """What a solver with a number of steps gives and costs.

    Attributes:
        solver: its name.
        num_inference_steps: its steps.
        network_evaluations: per sample.
        nrmse: RMSE / std(action) of one sample.
        energy_score: of `NUM_SAMPLES` samples, in std(action).
        energy_excess: share that its energy score, of distances to the power of `EXCESS_EXPONENT`, would be above the
            best setting's, were actions drawn by that. Fresh samples of the best setting say so with far less noise
            than the one recorded action of each row.
        excess_error: standard error of that share.
        us_per_action: wall time, in microseconds, of drawing `NUM_SAMPLES` samples for all rows at once.
        spread: calibrated factor on the spread of samples, per target dimension.
        coverage_90: share of recorded actions inside 90% highest-density regions of the calibrated samples.
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
    it in their own ways. So samples are stretched about their mean, which one Euler step gives: each dimension by
    itself, then all of them together, since regions of several dimensions need more than their intervals.

    Args:
        model: in eval mode; unchanged.
        rows: state, action and next_state, physical, on the model's device.
        std: (target_dim,) of the training actions; NaN where constant.
        settings: solvers and steps.
        seed: of the noise.
        calibrate: False to judge the model's own spread.

    Returns:
        One per setting whose samples are finite.

    Raises:
        TrainingDiverged: when none has such.
    """
    judge = _Judge(model, rows, std, seed)
    fresh = torch.randn(judge.noise.shape, generator=judge.generator, device=model.device)
    found, drawn, scores = [], [], []
    with _uncalibrated(model):
        for setting in settings:
            samples, seconds = judge.draw(setting)
            if not samples.isfinite().all():
                continue
            spread = judge.best_spread(samples) if calibrate else torch.ones_like(judge.target[0])
            drawn.append(judge.actions_of(judge.stretched(samples, spread)))
            scores.append(energy_scores(drawn[-1], judge.truth, std))
            found.append(
                SettingQuality(
                    solver=setting.solver,
                    num_inference_steps=setting.num_inference_steps,
                    network_evaluations=network_evaluations(setting),
                    nrmse=nrmse(drawn[-1][0], judge.truth, std),
                    energy_score=float(scores[-1].mean()),
                    energy_excess=0.0,
                    excess_error=0.0,
                    us_per_action=1e6 * seconds / (NUM_SAMPLES * len(judge.truth)),
                    spread=tuple(spread.tolist()),
                    coverage_90=_region_coverage(drawn[-1], judge.truth, std),
                    coverage_error=_coverage_error(len(judge.truth)),
                )
            )
        if not found:
            raise TrainingDiverged(
                "samples of a trained flow must be finite: with no solver and steps are they; lower learning_rate"
            )
        best = _best(found, scores)
        setting = found[best].setting
        model.spreads = {setting: found[best].spread}
        others = judge.actions_of(
            model.targets_in_blocks(judge.context, fresh, setting.num_inference_steps, setting.solver)
        )
    against_best = [expected_energy_scores(actions, others, std, EXCESS_EXPONENT) for actions in drawn]
    least = against_best[best]
    excess = [(score - least) / least.mean() for score in against_best]
    return [
        replace(quality, energy_excess=float(more.mean()), excess_error=_error(more))
        for quality, more in zip(found, excess, strict=True)
    ]


@torch.no_grad()
def calibrate_again(
    model: FlowInverseDynamics,
    rows: dict[str, Tensor],
    std: Float[np.ndarray, " target"],
    quality: SettingQuality,
    seed: int = 0,
) -> SettingQuality:
    """Return a setting's quality with its calibrated spread set right, by one factor, on more rows.

    Regions that are proven wrong on many rows may not have been on few. Arguments as of `quality_of_settings`.
    """
    judge = _Judge(model, rows, std, seed)
    with _uncalibrated(model):
        samples, _ = judge.draw(quality.setting)
    spread = samples.new_tensor(quality.spread)
    spread = spread * judge.common_factor((samples - judge.mean) * spread, LAST_ERRORS)
    return replace(
        quality,
        spread=tuple(spread.tolist()),
        coverage_90=judge.region_coverage(judge.stretched(samples, spread)),
        coverage_error=_coverage_error(len(judge.truth)),
    )


def choose_setting(curve: Sequence[SettingQuality]) -> SamplingSetting:
    """Return the cheapest setting that is as good as the best, among those whose regions are right.

    Regions are right where they hold 90%, give or take 1% and two standard errors; of settings that score far worse
    than the best (10%), none is taken for it. Where no setting's are right, those that come nearest count.
    """
    good = [q for q in _right(curve) if q.energy_excess <= max(TOLERANCE, NOISE_ERRORS * q.excess_error)]
    return min(good, key=lambda q: (q.network_evaluations, q.energy_score)).setting


def _right(curve: Sequence[SettingQuality]) -> list[SettingQuality]:
    """Return the settings whose regions are right and that score not far worse than the best."""
    most = (1 + CALIBRATED_TOLERANCE) * min(q.energy_score for q in curve)
    near = [q for q in curve if q.energy_score <= most]
    nearest = min(map(_coverage_gap, near))
    return [q for q in near if _coverage_gap(q) <= max(nearest, COVERAGE_TOLERANCE) + NOISE_ERRORS * q.coverage_error]


def _best(curve: Sequence[SettingQuality], scores: Sequence[Float[np.ndarray, " rows"]]) -> int:
    """Return the index of the finest of the right settings whose energy score is not proven to be above the lowest.

    The lowest alone may be that of few steps, by chance: then none would be as good as these.
    """
    right = [curve.index(quality) for quality in _right(curve)]
    lowest = scores[min(right, key=lambda index: curve[index].energy_score)]
    more = {index: scores[index] - lowest for index in right}
    equal = [index for index in right if more[index].mean() <= NOISE_ERRORS * _error(more[index])]
    return max(equal, key=lambda index: curve[index].network_evaluations)


def _error(values: Float[np.ndarray, " rows"]) -> float:
    """Return the standard error of their mean."""
    return float(values.std() / np.sqrt(len(values)))


def _coverage_gap(quality: SettingQuality) -> float:
    return abs(quality.coverage_90 - LEVEL)


def _coverage_error(num_rows: int) -> float:
    return math.sqrt(LEVEL * (1 - LEVEL) / num_rows)


class _Judge:
    """Rows to judge settings by, what the model makes of them, and the noise that is the same for all."""

    def __init__(
        self, model: FlowInverseDynamics, rows: dict[str, Tensor], std: Float[np.ndarray, " target"], seed: int
    ):
        self.model, self.std = model, std
        self.truth = flat_actions(rows["action"].cpu().numpy())
        self.generator = torch.Generator(model.device).manual_seed(seed)
        shape = (NUM_SAMPLES, len(self.truth), model.target_dim)
        self.noise = torch.randn(shape, generator=self.generator, device=model.device)
        self.context, self.target = model.encode(rows["state"], rows["action"], rows["next_state"])
        self.base = model.encode_transition(rows["state"], rows["next_state"])[1]
        self.mean = model.targets_in_blocks(self.context, self.noise, 1, "euler")

    def draw(self, setting: SamplingSetting) -> tuple[Float[Tensor, "samples rows target"], float]:
        """Return targets and the seconds that they took."""
        started = time.perf_counter()
        drawn = self.model.targets_in_blocks(self.context, self.noise, setting.num_inference_steps, setting.solver)
        if drawn.is_cuda:
            torch.cuda.synchronize()
        return drawn, time.perf_counter() - started

    def best_spread(self, samples: Float[Tensor, "samples rows target"]) -> Float[Tensor, " target"]:
        """Return the calibrated factors on the distance of samples from their mean."""
        spread = _best_spreads(samples, self.mean, self.target)
        return spread * self.common_factor((samples - self.mean) * spread, PROVEN_ERRORS)

    def common_factor(self, off: Float[Tensor, "samples rows target"], errors: float) -> float:
        """Return the factor on the distance of samples from their mean that makes regions right; see below.

        Args:
            off: the distance.
            errors: standard errors that prove regions wrong.
        """
        return _common_factor(self.mean, off, self.region_coverage, errors * _coverage_error(len(self.truth)))

    def stretched(
        self, samples: Float[Tensor, "samples rows target"], spread: Float[Tensor, " target"]
    ) -> Float[Tensor, "samples rows target"]:
        """Return samples, their distance from their mean multiplied."""
        return torch.lerp(self.mean, samples, spread)

    def actions_of(self, targets: Float[Tensor, "samples rows target"]) -> Float[np.ndarray, "samples rows target"]:
        """Return physical actions, flat and float64."""
        return np.stack([flat_actions(action) for action in self.model.decode(targets, self.base).cpu().numpy()])

    def region_coverage(self, targets: Float[Tensor, "samples rows target"]) -> float:
        """Return the share of rows whose action lies in the 90% region of their samples."""
        return _region_coverage(self.actions_of(targets), self.truth, self.std)


@contextmanager
def _uncalibrated(model: FlowInverseDynamics) -> Iterator[None]:
    """Draw with the model's own spread inside."""
    kept, model.spreads = model.spreads, {}
    try:
        yield
    finally:
        model.spreads = kept


def _common_factor(
    mean: Float[Tensor, "samples rows target"],
    off: Float[Tensor, "samples rows target"],
    coverage: Callable[[Tensor], float],
    slack: float,
) -> float:
    """Return the factor on all dimensions with which 90% regions come nearest to holding 90%.

    It is 1 where they are not proven wrong: 1% on two branches about their mean is 2% on the force that they imply.
    """
    gap, factor = coverage(mean + off) - LEVEL, 1.0
    if abs(gap) <= slack:
        return factor
    step = REGION_STEP if gap < 0 else 1 / REGION_STEP
    for _ in range(MAX_REGION_STEPS):
        next_gap = coverage(mean + step * factor * off) - LEVEL
        if abs(next_gap) >= abs(gap):
            break
        gap, factor = next_gap, step * factor
    return factor


def _region_coverage(
    samples: Float[np.ndarray, "samples rows dims"],
    truth: Float[np.ndarray, "rows dims"],
    std: Float[np.ndarray, " dims"],
) -> float:
    """Return the share of rows whose action lies in the 90% highest-density region of its samples."""
    return float((density_levels(samples, truth, std, np.random.default_rng(0)) <= LEVEL).mean())


def _best_spreads(
    samples: Float[Tensor, "samples rows target"],
    mean: Float[Tensor, "samples rows target"],
    target: Float[Tensor, "rows target"],
) -> Float[Tensor, " target"]:
    """Return the factor on the samples' distance from their mean of each dimension.

    It is the one whose 90% intervals come nearest to holding 90%, of those whose continuous ranked probability score is
    within 1% (or noise) of the lowest; 1 where neither is proven wrong.
    """
    by_dim = (values.double().movedim(-1, 0).contiguous().cpu().numpy() for values in (mean, samples - mean, target))
    best = [_best_spread(*each) for each in zip(*by_dim, strict=True)]
    return torch.tensor(best, dtype=samples.dtype, device=samples.device)


def _best_spread(
    mean: Float[np.ndarray, "samples rows"],
    off: Float[np.ndarray, "samples rows"],
    truth: Float[np.ndarray, " rows"],
) -> float:
    scores: dict[int, Float[np.ndarray, " rows"]] = {}

    def best_of(powers: Iterable[int]) -> int:
        for power in set(powers) - set(scores):
            scores[power] = crps((mean + SPREADS[power] * off)[..., None], truth[:, None])[:, 0]
        return min(scores, key=lambda power: scores[power].mean())

    own, last = SPREADS.index(1.0), len(SPREADS)
    coarse = best_of({own, *range(0, last, STRIDE)})
    best = best_of(range(max(0, coarse - STRIDE), min(last, coarse + STRIDE + 1)))
    near = []
    for power, score in scores.items():
        more = score - scores[best]
        slack = max(SPREAD_TOLERANCE * scores[best].mean(), NOISE_ERRORS * _error(more))
        if more.mean() <= slack:
            near.append(power)
    gaps = {power: abs(_coverage(mean + SPREADS[power] * off, truth) - LEVEL) for power in near}
    if own in gaps and gaps[own] <= max(PROVEN_ERRORS * _coverage_error(len(truth)), min(gaps.values())):
        return 1.0
    return SPREADS[min(gaps, key=lambda power: gaps[power])]


def _coverage(samples: Float[np.ndarray, "samples *values"], truth: Float[np.ndarray, "*values"]) -> float:
    """Return the share of values that lie between the lowest and the highest of their samples."""
    return float(np.mean((samples.min(axis=0) <= truth) & (truth <= samples.max(axis=0))))
