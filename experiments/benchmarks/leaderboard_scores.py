"""What the leaderboard measures of a model: its samples on held-out rows, by the library's own metrics."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from measure import cpu_seconds

from invdyn.evaluation.distribution import calibrate, score
from invdyn.evaluation.intervals import EpisodeBootstrap
from invdyn.evaluation.metrics import energy_score, flat_actions, nrmse, varying_std
from invdyn.evaluation.simulation import (
    RecordedSimulator,
    current_state,
    posterior_samples,
    reached_states,
    recorded_simulator,
)
from invdyn.evaluation.two_sample import classifier_two_sample
from invdyn.models.base import InverseDynamics
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting, network_evaluations
from invdyn.statistics import transition_features
from invdyn.transitions.store import TransitionStore

TEST_ROWS, TEST_SAMPLES = 2_000, 32
CHOICE_ROWS, CHOICE_SAMPLES = 1_000, 8
TIMED_ROWS, TIMED_CALLS = 1_000, 5
COLUMNS = ("state", "action", "next_state", "episode")

Samples = Float[np.ndarray, "samples rows dims"]


@dataclass(frozen=True)
class Rows:
    """Held-out rows of a problem.

    Attributes:
        columns: state, action, next_state, episode.
        features: (rows, features) [s, s' - s] float64: what peers are given.
        action: (rows, dims) float64.
        std: (dims,) of the training rows.
        num_samples: samples that scores are taken from.
        simulator: of the recording.
    """

    columns: dict[str, np.ndarray]
    features: Float[np.ndarray, "rows features"]
    action: Float[np.ndarray, "rows dims"]
    std: Float[np.ndarray, " dims"]
    num_samples: int
    simulator: RecordedSimulator


@dataclass(frozen=True)
class Predictions:
    """A model's answer to some rows.

    Attributes:
        samples: (samples, rows, dims).
        log_prob: (rows,) of the recorded actions in nats, or None.
        network_evaluations: per action.
        us_per_action: CPU time of one action in a batch of 1,000.
    """

    samples: Samples
    log_prob: Float[np.ndarray, " rows"] | None
    network_evaluations: int
    us_per_action: float


def held_out(store: TransitionStore, split: str) -> Rows:
    """Read the rows that models are compared on (test), or chosen by (val)."""
    count, num_samples = (TEST_ROWS, TEST_SAMPLES) if split == "test" else (CHOICE_ROWS, CHOICE_SAMPLES)
    columns = store.load_spread(split, count, columns=COLUMNS)
    return Rows(
        columns=columns,
        features=transition_features(columns["state"], columns["next_state"]),
        action=flat_actions(columns["action"]),
        std=varying_std(store.moments, slice((store.history + 2) * store.state_dim, None)),
        num_samples=num_samples,
        simulator=recorded_simulator(store),
    )


def predict(model: InverseDynamics, rows: Rows, seed: int) -> Predictions:
    """Let one of our models answer, as it predicts by default."""
    generator = torch.Generator().manual_seed(seed)
    state, action, next_state = (torch.from_numpy(rows.columns[name]) for name in COLUMNS[:3])
    samples = model.sample(state, next_state, rows.num_samples, generator=generator).numpy()
    first = state[:TIMED_ROWS], next_state[:TIMED_ROWS]
    return Predictions(
        samples=samples.reshape(*samples.shape[:2], -1).astype(np.float64),
        log_prob=_log_prob(model, state, action, next_state),
        network_evaluations=_network_evaluations(model),
        us_per_action=1e6 * cpu_per_call(lambda: model.sample(*first)) / len(first[0]),
    )


def chosen_by(predictions: Predictions, rows: Rows) -> float:
    """Return what hyperparameters are chosen by: the energy score."""
    return energy_score(predictions.samples, rows.action, rows.std)


def judge(predictions: Predictions, rows: Rows, seed: int) -> dict[str, Any]:
    """Return the leaderboard's numbers of one trained model; None where a number does not exist."""
    samples = predictions.samples
    bootstrap = EpisodeBootstrap(rows.columns["episode"])
    scores = score(samples, rows.action, rows.std, bootstrap)
    calibration = calibrate(samples, rows.action, rows.std, bootstrap, seed)
    nats = None if predictions.log_prob is None else -float(predictions.log_prob.mean()) / rows.action.shape[1]
    return {
        "nrmse": nrmse(samples[0], rows.action, rows.std),
        "energy_score": scores.energy_score,
        "crps": scores.crps,
        "nll_per_dim": nats if nats is not None and np.isfinite(nats) else None,
        "coverage_50": calibration.coverage_50,
        "coverage_90": calibration.coverage_90,
        **_against_simulator(samples[0], rows, seed),
        "network_evaluations": predictions.network_evaluations,
        "us_per_action": predictions.us_per_action,
    }


def cpu_per_call(call: Callable[[], object]) -> float:
    """Return the median CPU seconds of a call, after one to warm up."""
    call()
    times = []
    for _ in range(TIMED_CALLS):
        started = cpu_seconds()
        call()
        times.append(cpu_seconds() - started)
    return statistics.median(times)


def _against_simulator(action: Float[np.ndarray, "rows dims"], rows: Rows, seed: int) -> dict[str, float | None]:
    """Return the round trip (RMSE / std of s' - s), and C2ST and force error against the exact posterior."""
    state, next_state = rows.columns["state"], rows.columns["next_state"]
    reached, _ = reached_states(rows.simulator, state, action[:, None], next_state, 1)
    change = (next_state.astype(np.float64) - current_state(state, next_state)).std(axis=0)
    found: dict[str, float | None] = {
        "round_trip": None if reached is None else nrmse(reached, next_state, change),
        "c2st": None,
        "force_error": None,
    }
    exact, _ = posterior_samples(rows.simulator, state, next_state, 1, seed)
    if exact is not None and np.isfinite(action).all():
        pairs = (np.hstack([rows.features, each]) for each in (action, exact[0]))
        found["c2st"] = classifier_two_sample(*pairs, seed).accuracy
        posterior = rows.simulator.posterior
        assert posterior is not None
        force = posterior.force(current_state(state, next_state), next_state.astype(np.float64))
        found["force_error"] = float(np.sqrt(np.mean(np.square(posterior.force_of(action) - force))) / force.std())
    return found


def _log_prob(
    model: InverseDynamics, state: torch.Tensor, action: torch.Tensor, next_state: torch.Tensor
) -> Float[np.ndarray, " rows"] | None:
    from invdyn.errors import ConfigError

    try:
        with torch.no_grad():
            return model.log_prob(state, action, next_state).double().numpy()
    except ConfigError:
        return None


def _network_evaluations(model: InverseDynamics) -> int:
    if isinstance(model, FlowInverseDynamics):
        return network_evaluations(SamplingSetting(model.solver, model.num_inference_steps))
    return int(model.trainable)
