"""What samples say about a predicted distribution: scores, calibration, sharpness; each with what its rows support."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Num

from invdyn.errors import ConfigError
from invdyn.evaluation.calibration import (
    NOMINAL,
    calibration_error,
    central_levels,
    coverage,
    density_levels,
    interval_widths,
)
from invdyn.evaluation.intervals import EpisodeBootstrap, Interval
from invdyn.evaluation.metrics import PerDim, Rows, Samples, crps, energy_scores
from invdyn.models.base import InverseDynamics

HALF, MOST = 0.5, 0.9


@dataclass(frozen=True)
class Scores:
    """Proper scores of samples; lower is better.

    Attributes:
        energy_score: of all dimensions together, in std of the action.
        crps: mean over the dimensions that vary, in std of the action.
        crps_per_dim: (dims,) in the units of the action.
        energy_score_interval: 95%, over episodes.
        crps_interval: likewise.
    """

    energy_score: float
    crps: float
    crps_per_dim: tuple[float, ...]
    energy_score_interval: Interval | None
    crps_interval: Interval | None


@dataclass(frozen=True)
class Calibration:
    """How often regions of the predicted distribution hold the recorded action, and how wide they are.

    Attributes:
        nominal: levels of the curves.
        region: share of rows whose action lies in the highest-density region of each level, all dimensions at once.
        central: the same for central intervals of single dimensions, mean over the dimensions that vary.
        coverage_50: `region` at level .5, and `coverage_90` at .9.
        coverage_50_interval: 95%, over episodes; likewise `coverage_90_interval`.
        error: mean distance of `region` from the diagonal.
        central_50_per_dim: (dims,) share of rows in the central interval of level .5, and `central_90_per_dim`.
        width_50_per_dim: (dims,) mean width of that interval in the units of the action, and `width_90_per_dim`.
        width_90: mean over the dimensions that vary, in std of the action.
        num_rows: rows looked at.
        num_samples: samples of each.
    """

    nominal: tuple[float, ...]
    region: tuple[float, ...]
    central: tuple[float, ...]
    coverage_50: float
    coverage_90: float
    coverage_50_interval: Interval | None
    coverage_90_interval: Interval | None
    error: float
    central_50_per_dim: tuple[float, ...]
    central_90_per_dim: tuple[float, ...]
    width_50_per_dim: tuple[float, ...]
    width_90_per_dim: tuple[float, ...]
    width_90: float
    num_rows: int
    num_samples: int


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of recorded actions; lower is better.

    Attributes:
        nats: mean over rows of -ln p(action), the density per physical unit; infinite when an action is impossible.
        nats_per_dim: divided by the number of action dimensions.
        nats_per_dim_of_std: the same with the action measured in its standard deviations.
        impossible: share of rows whose action has density zero.
        interval: of `nats`, 95%, over episodes.
        num_rows: rows looked at.
    """

    nats: float
    nats_per_dim: float
    nats_per_dim_of_std: float
    impossible: float
    interval: Interval | None
    num_rows: int


def score(samples: Samples, truth: Rows, std: PerDim, bootstrap: EpisodeBootstrap) -> Scores:
    """Score samples (samples, rows, dims) against recorded actions (rows, dims); `std` as of `varying_std`."""
    energy = energy_scores(samples, truth, std)
    values = crps(samples, truth)
    scaled = (values / std)[:, std > 0].mean(axis=1)
    return Scores(
        energy_score=float(energy.mean()),
        crps=float(scaled.mean()),
        crps_per_dim=tuple(values.mean(axis=0).tolist()),
        energy_score_interval=bootstrap.interval(energy),
        crps_interval=bootstrap.interval(scaled),
    )


def calibrate(samples: Samples, truth: Rows, std: PerDim, bootstrap: EpisodeBootstrap, seed: int = 0) -> Calibration:
    """Measure coverage and width of the regions of samples (samples, rows, dims); many samples make sharp regions."""
    generator = np.random.default_rng(seed)
    varies = std > 0
    region = density_levels(samples, truth, std, generator)
    central = central_levels(samples, truth, std, generator)
    broken = ~np.isfinite(samples).all(axis=(0, 2))
    region[broken], central[broken] = np.inf, np.inf  # samples that are not finite make no region that holds anything
    of_region = coverage(region)
    half, most = interval_widths(samples, HALF), interval_widths(samples, MOST)
    return Calibration(
        nominal=NOMINAL,
        region=tuple(of_region.tolist()),
        central=tuple(coverage(central[:, varies]).tolist()),
        coverage_50=float((region <= HALF).mean()),
        coverage_90=float((region <= MOST).mean()),
        coverage_50_interval=bootstrap.interval((region <= HALF).astype(np.float64)),
        coverage_90_interval=bootstrap.interval((region <= MOST).astype(np.float64)),
        error=calibration_error(of_region),
        central_50_per_dim=tuple((central <= HALF).mean(axis=0).tolist()),
        central_90_per_dim=tuple((central <= MOST).mean(axis=0).tolist()),
        width_50_per_dim=tuple(half.tolist()),
        width_90_per_dim=tuple(most.tolist()),
        width_90=float((most / std)[varies].mean()),
        num_rows=len(truth),
        num_samples=len(samples),
    )


def likelihood(
    model: InverseDynamics, columns: dict[str, Num[np.ndarray, "rows ..."]], std: PerDim, bootstrap: EpisodeBootstrap
) -> tuple[Likelihood | None, str | None]:
    """Return the likelihood of the recorded actions, or None and why the model has none.

    Args:
        model: in eval mode.
        columns: state, action and next_state, physical units.
        std: (dims,), from `varying_std`.
        bootstrap: of the same rows.
    """
    tensors = (torch.from_numpy(columns[name]).to(model.device) for name in ("state", "action", "next_state"))
    try:
        with torch.no_grad():
            nats = -model.log_prob(*tensors).double().cpu().numpy()
    except ConfigError as error:
        return None, str(error)
    mean, dims = float(nats.mean()), len(std)
    per_dim = mean / dims
    found = Likelihood(
        nats=mean,
        nats_per_dim=per_dim,
        nats_per_dim_of_std=per_dim - float(np.log(std).mean()),
        impossible=float(np.isposinf(nats).mean()),
        interval=bootstrap.interval(nats),
        num_rows=len(nats),
    )
    return found, None
