"""What an evaluation found: frozen records that become `metrics.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from invdyn.evaluation.distribution import Calibration, Likelihood, Scores
from invdyn.evaluation.intervals import Interval
from invdyn.evaluation.noise_floor import NoiseFloor
from invdyn.evaluation.speed import Speed
from invdyn.evaluation.two_sample import TwoSample


@dataclass(frozen=True)
class Errors:
    """Predictions against a truth; values per dimension are NaN where the training rows are constant.

    Attributes:
        nrmse: RMSE of all standardised values.
        nrmse_interval: 95%, over episodes; None for fewer than 5 of them.
        nrmse_per_dim: RMSE / std of the training rows.
        rmse_per_dim: RMSE in the units of the action.
        r2: mean of `r2_per_dim` over the dimensions that vary.
        r2_per_dim: share of the variance explained.
    """

    nrmse: float
    nrmse_interval: Interval | None
    nrmse_per_dim: tuple[float, ...]
    rmse_per_dim: tuple[float, ...]
    r2: float
    r2_per_dim: tuple[float, ...]


@dataclass(frozen=True)
class RoundTrip:
    """States reached in the simulator against the recorded next states.

    Attributes:
        nrmse: RMSE / std of next_state - state, over all state dimensions that change.
        nrmse_per_dim: the same per state dimension.
    """

    nrmse: float
    nrmse_per_dim: tuple[float, ...]


@dataclass(frozen=True)
class Simulated:
    """What the simulator says about some actions.

    Attributes:
        exact_nrmse: RMSE / std against the exact physical inverse, or None.
        round_trip: where the actions lead, or None.
        force_nrmse: RMSE / std of the motor's force against the exact one, where many actions have it; or None.
    """

    exact_nrmse: float | None
    round_trip: RoundTrip | None
    force_nrmse: float | None


@dataclass(frozen=True)
class Result:
    """One model at one number of solver steps.

    Attributes:
        model: name of the model.
        num_inference_steps: solver steps; None for a model that takes none.
        network_evaluations: network evaluations per action.
        is_default: whether the model itself predicts with this number of steps.
        one_sample: one prediction per transition against the recorded action.
        mean_of_samples: the mean of several predictions against the recorded action.
        scores: of the samples as a distribution.
        calibration: of the regions of the predicted distribution.
        likelihood: of the recorded actions, or None. The same at every number of steps.
        likelihood_reason: why there is no likelihood, or None.
        two_sample: against the exact posterior; only at the model's own number of steps, where there is one.
        simulated: one prediction per transition in the simulator.
        speed: wall time.
        examples: (rows, dims) some predictions, for plots; not in the JSON.
    """

    model: str
    num_inference_steps: int | None
    network_evaluations: int
    is_default: bool
    one_sample: Errors
    mean_of_samples: Errors
    scores: Scores
    calibration: Calibration
    likelihood: Likelihood | None
    likelihood_reason: str | None
    two_sample: TwoSample | None
    simulated: Simulated
    speed: Speed
    examples: Float[np.ndarray, "rows dims"] = field(repr=False, compare=False)

    @property
    def energy_score(self) -> float:
        """Of the samples, in std of the action."""
        return self.scores.energy_score

    @property
    def label(self) -> str:
        """Name for tables and legends."""
        if self.num_inference_steps is None:
            return self.model
        return f"{self.model}, {self.num_inference_steps} step{'s' if self.num_inference_steps > 1 else ''}"


@dataclass(frozen=True)
class ExactPosterior:
    """Samples of the exact p(action | state, next_state) in the place of a model's: what the best model would score.

    Attributes:
        one_sample: one sample per transition against the recorded action.
        mean_of_samples: the mean of several.
        scores: of the samples as a distribution.
        calibration: off the diagonal by chance alone.
    """

    one_sample: Errors
    mean_of_samples: Errors
    scores: Scores
    calibration: Calibration


@dataclass(frozen=True)
class Evaluation:
    """All models on the same rows; the first result's model is the one under evaluation.

    Attributes:
        split: which rows.
        num_rows: how many of them were used.
        num_episodes: from how many episodes; intervals are over these.
        num_samples: predictions per transition for the mean and the energy score.
        seed: of the rows, and of each variant's noise.
        device: where the models ran.
        cpu_threads: threads that torch may use on the CPU.
        env_id: the simulator, or None.
        recorded: the recorded actions themselves in the simulator: the floor of what any model can reach.
        exact_rows: rows compared with the exact inverse: without active contacts, joint limits or clipping.
        exact_reason: why there is no comparison with the exact inverse, or None.
        round_trip_reason: why there is no round trip, or None.
        noise_floor: how much neighbouring transitions leave open; None for training rows, and for too few others.
        posterior: the exact posterior's own scores, or None.
        posterior_reason: why there is no exact posterior, or None.
        steps_chosen: whether the number of steps of the model under evaluation was chosen on validation rows.
        results: one per model and number of steps.
        truth: (rows, dims) the recorded actions of `Result.examples`, for plots; not in the JSON.
    """

    split: str
    num_rows: int
    num_episodes: int
    num_samples: int
    seed: int
    device: str
    cpu_threads: int
    env_id: str | None
    recorded: Simulated
    exact_rows: int
    exact_reason: str | None
    round_trip_reason: str | None
    noise_floor: NoiseFloor | None
    posterior: ExactPosterior | None
    posterior_reason: str | None
    steps_chosen: bool
    results: tuple[Result, ...]
    truth: Float[np.ndarray, "rows dims"] = field(repr=False, compare=False)

    @property
    def subject(self) -> str:
        """Name of the model under evaluation."""
        return self.results[0].model

    @property
    def models(self) -> list[str]:
        """Names of all models, the one under evaluation first."""
        return list(dict.fromkeys(result.model for result in self.results))

    def of_model(self, model: str) -> list[Result]:
        """Return the results of one model by rising number of steps."""
        return [result for result in self.results if result.model == model]

    def default_of(self, model: str) -> Result:
        """Return a model's result at its own number of steps."""
        return next(result for result in self.of_model(model) if result.is_default)

    def best_of(self, model: str) -> Result:
        """Return a model's result with the lowest error of one sample."""
        finite = [result for result in self.of_model(model) if math.isfinite(result.one_sample.nrmse)]
        return min(finite, key=lambda result: result.one_sample.nrmse, default=self.default_of(model))

    def to_json(self) -> dict[str, Any]:
        """Return plain values without the examples; NaN and infinity become null."""
        values: dict[str, Any] = to_plain(self)
        return values


def to_plain(value: Any) -> Any:
    """Return what JSON can hold: records and mappings as dicts, NaN and infinity as None, other objects as text."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.compare}
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
