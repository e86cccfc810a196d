"""Evaluate models side by side on the held-out rows of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from invdyn.errors import ConfigError, DataError
from invdyn.evaluation.distribution import Likelihood, calibrate, likelihood, score
from invdyn.evaluation.intervals import EpisodeBootstrap
from invdyn.evaluation.metrics import flat_actions, nrmse, nrmse_per_dim, r2_per_dim, rmse_per_dim, varying_std
from invdyn.evaluation.noise_floor import NEIGHBOURS, QUERIES, REFERENCES, NoiseFloor, estimate_noise_floor
from invdyn.evaluation.results import Errors, Evaluation, ExactPosterior, Result, RoundTrip, Simulated
from invdyn.evaluation.simulation import (
    ExactActions,
    RecordedSimulator,
    current_state,
    exact_actions,
    posterior_samples,
    reached_states,
    recorded_simulator,
)
from invdyn.evaluation.speed import Speed, measure_speed
from invdyn.evaluation.two_sample import FEWEST_PAIRS, TwoSample, classifier_two_sample
from invdyn.models.base import InverseDynamics
from invdyn.models.flow import FlowInverseDynamics
from invdyn.models.linear import LinearInverse
from invdyn.models.solvers import get_solver
from invdyn.statistics import transition_features
from invdyn.transitions.store import TransitionStore, spread_rows

STEP_COUNTS = (1, 2, 4, 8, 16, 32)
NUM_SAMPLES = 8
MAX_ROWS = 20_000
EXAMPLE_ROWS = 2_000
SAMPLE_CHUNK_ROWS = 4_096
CALIBRATION_SAMPLES = 64
CALIBRATION_ROWS, OTHER_CALIBRATION_ROWS = 3_000, 1_000
"""Regions need more samples than scores do, and fewer rows: 3,000 tell 90% from 89% and 91%. The second number is for
models at other numbers of steps than their own."""

TWO_SAMPLE_ROWS = 10_000
COLUMNS = ("state", "action", "next_state", "episode")

Columns = dict[str, Num[np.ndarray, "rows ..."]]


@dataclass(frozen=True)
class _Variant:
    """A model at a number of solver steps."""

    name: str
    model: InverseDynamics
    num_inference_steps: int | None
    network_evaluations: int
    is_default: bool

    @property
    def key(self) -> str:
        return f"{self.name}/{self.num_inference_steps}"


@dataclass(frozen=True)
class _Rows:
    """The rows of an evaluation, with what every variant is compared to."""

    columns: Columns
    action: Float[np.ndarray, "rows dims"]
    bootstrap: EpisodeBootstrap
    action_std: Float[np.ndarray, " dims"]
    change_std: Float[np.ndarray, " state_dim"]
    gap: int
    simulator: RecordedSimulator
    exact: ExactActions | None
    exact_reason: str | None

    def spread(self, count: int) -> tuple[Columns, Float[np.ndarray, "rows dims"], EpisodeBootstrap]:
        """Return columns, actions and bootstrap of at most `count` evenly spaced rows."""
        index = spread_rows(len(self.action), count)
        columns = {name: values[index] for name, values in self.columns.items()}
        return columns, self.action[index], EpisodeBootstrap(columns["episode"])


def evaluate(
    models: Mapping[str, InverseDynamics],
    store: TransitionStore,
    *,
    split: str = "test",
    step_counts: Sequence[int] = STEP_COUNTS,
    num_samples: int = NUM_SAMPLES,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Evaluate models on the same rows with the same noise; all but the times depend on the arguments alone.

    A model with a solver is evaluated at each number of steps and at its own; models without one, once.

    Args:
        models: name to model, the one under evaluation first; they are moved to `device`.
        store: the dataset.
        split: train, val or test.
        step_counts: numbers of solver steps.
        num_samples: predictions per transition for the mean and the energy score, 2 or more.
        max_rows: rows to use, drawn without repetition by `seed` when the split has more.
        seed: of the rows, and of each variant's noise.
        device: where the models run.

    Raises:
        DataError: when the split has no rows, or a model has other dimensions than the dataset.
        ConfigError: when a count is too small.
    """
    check_request(store, split, step_counts, num_samples, max_rows)
    for name, model in models.items():
        check_dimensions(name, model, store)
    device = torch.device(device)
    rows = _load_rows(store, split, max_rows, seed)
    variants = [v for name, model in models.items() for v in _variants(name, model.to(device).eval(), step_counts)]
    speed = measure_speed({v.key: partial(_predict_batch, v, rows, device) for v in variants}, device)
    likelihoods = {name: _likelihood(model, rows) for name, model in models.items()}
    results = tuple(
        _evaluate_variant(v, rows, num_samples, seed, speed[v.key], likelihoods[v.name], device) for v in variants
    )
    recorded, round_trip_reason = _simulate(rows, rows.columns["action"])
    posterior, posterior_reason = _exact_posterior(rows, num_samples, seed)
    return Evaluation(
        split=split,
        num_rows=len(rows.action),
        num_episodes=rows.bootstrap.num_episodes,
        num_samples=num_samples,
        seed=seed,
        device=str(device),
        cpu_threads=torch.get_num_threads(),
        env_id=rows.simulator.env_id,
        recorded=recorded,
        exact_rows=int(rows.exact.trusted.sum()) if rows.exact else 0,
        exact_reason=rows.exact_reason,
        round_trip_reason=round_trip_reason,
        noise_floor=_noise_floor(store, rows) if split != "train" else None,
        posterior=posterior,
        posterior_reason=posterior_reason,
        steps_chosen=getattr(next(iter(models.values())), "validated", None) is not None,
        results=results,
        truth=rows.action[:EXAMPLE_ROWS],
    )


def linear_baseline(store: TransitionStore) -> LinearInverse:
    """Return the linear inverse of a dataset, from the statistics of its training rows."""
    model = LinearInverse(store.state_dim, store.action_dim, history=store.history, horizon=store.horizon)
    model.fit_normalization(store.moments)
    return model


def check_dimensions(name: str, model: InverseDynamics, store: TransitionStore) -> None:
    """Check that a model fits a dataset.

    Raises:
        DataError: naming both sides' dimensions.
    """
    names = ("state_dim", "action_dim", "history", "horizon")
    of_model, of_store = ({key: getattr(side, key) for key in names} for side in (model, store))
    if of_model != of_store:
        wanted, found = (", ".join(f"{k} {v}" for k, v in side.items()) for side in (of_model, of_store))
        raise DataError(
            f"checkpoint and dataset must have the same dimensions: model {name!r} has {wanted}; {store.path} has "
            f"{found}; give the dataset the model was trained for"
        )


def check_request(
    store: TransitionStore, split: str, step_counts: Sequence[int], num_samples: int, max_rows: int
) -> None:
    """Check the arguments of `evaluate`.

    Raises:
        DataError: when the split has no rows.
        ConfigError: when a count is too small.
    """
    if num_samples < 2 or min(step_counts, default=1) < 1 or max_rows < 1:
        raise ConfigError(
            "num_samples must be 2 or more, step counts and max_rows 1 or more; got "
            f"{num_samples}, {list(step_counts)} and {max_rows}"
        )
    if store.num_rows(split) == 0:
        raise DataError(f"the {split} split must have rows, {store.path} has none; evaluate another split with --split")


def _load_rows(store: TransitionStore, split: str, max_rows: int, seed: int) -> _Rows:
    available = store.num_rows(split)
    if available > max_rows:
        chosen = np.sort(np.random.default_rng(seed).choice(available, max_rows, replace=False))
        columns: Columns = store.take(split, chosen, columns=COLUMNS)
    else:
        columns = store.load(split, columns=COLUMNS)
    num_features = (store.history + 2) * store.state_dim
    simulator = recorded_simulator(store)
    exact, exact_reason = exact_actions(simulator, columns["state"], columns["next_state"])
    return _Rows(
        columns=columns,
        action=flat_actions(columns["action"]),
        bootstrap=EpisodeBootstrap(columns["episode"]),
        action_std=varying_std(store.moments, slice(num_features, None)),
        change_std=varying_std(store.moments, slice(num_features - store.state_dim, num_features)),
        gap=store.gap,
        simulator=simulator,
        exact=exact,
        exact_reason=exact_reason,
    )


def _variants(name: str, model: InverseDynamics, step_counts: Sequence[int]) -> Iterator[_Variant]:
    if not isinstance(model, FlowInverseDynamics):
        yield _Variant(name, model, None, int(model.trainable), is_default=True)
        return
    own, cost = model.num_inference_steps, get_solver(model.solver).evaluations_per_step
    for steps in sorted({*step_counts, own}):
        yield _Variant(name, model, steps, steps * cost, is_default=steps == own)


def _evaluate_variant(
    variant: _Variant,
    rows: _Rows,
    num_samples: int,
    seed: int,
    speed: Speed,
    nll: tuple[Likelihood | None, str | None],
    device: torch.device,
) -> Result:
    samples = _sample(variant, rows.columns, num_samples, seed, device)
    flat = _flat_samples(samples)
    columns, truth, bootstrap = rows.spread(CALIBRATION_ROWS if variant.is_default else OTHER_CALIBRATION_ROWS)
    many = _flat_samples(_sample(variant, columns, CALIBRATION_SAMPLES, seed + 1, device))
    return Result(
        model=variant.name,
        num_inference_steps=variant.num_inference_steps,
        network_evaluations=variant.network_evaluations,
        is_default=variant.is_default,
        one_sample=_errors(flat[0], rows),
        mean_of_samples=_errors(flat.mean(axis=0), rows),
        scores=score(flat, rows.action, rows.action_std, rows.bootstrap),
        calibration=calibrate(many, truth, rows.action_std, bootstrap, seed),
        likelihood=nll[0],
        likelihood_reason=nll[1],
        two_sample=_two_sample(flat[0], rows, seed) if variant.is_default else None,
        simulated=_simulate(rows, samples[0])[0],
        speed=speed,
        examples=flat[0, :EXAMPLE_ROWS],
    )


def _likelihood(model: InverseDynamics, rows: _Rows) -> tuple[Likelihood | None, str | None]:
    columns, _, bootstrap = rows.spread(CALIBRATION_ROWS)
    return likelihood(model, columns, rows.action_std, bootstrap)


def _two_sample(prediction: Float[np.ndarray, "rows dims"], rows: _Rows, seed: int) -> TwoSample | None:
    """Compare one sample per transition with one of the exact posterior; None where that is not known."""
    columns, _, _ = rows.spread(TWO_SAMPLE_ROWS)
    prediction = prediction[spread_rows(len(prediction), TWO_SAMPLE_ROWS)]
    exact, _ = posterior_samples(rows.simulator, columns["state"], columns["next_state"], 1, seed)
    if exact is None or len(prediction) < FEWEST_PAIRS or not np.isfinite(prediction).all():
        return None
    features = transition_features(columns["state"], columns["next_state"])
    return classifier_two_sample(np.hstack([features, prediction]), np.hstack([features, exact[0]]), seed)


def _exact_posterior(rows: _Rows, num_samples: int, seed: int) -> tuple[ExactPosterior | None, str | None]:
    """Score the exact posterior as if it were a model, or say why there is none."""
    state, next_state = rows.columns["state"], rows.columns["next_state"]
    samples, reason = posterior_samples(rows.simulator, state, next_state, num_samples, seed)
    if samples is None:
        return None, reason
    columns, truth, bootstrap = rows.spread(CALIBRATION_ROWS)
    state, next_state = columns["state"], columns["next_state"]
    many, _ = posterior_samples(rows.simulator, state, next_state, CALIBRATION_SAMPLES, seed + 1)
    assert many is not None
    return ExactPosterior(
        one_sample=_errors(samples[0], rows),
        mean_of_samples=_errors(samples.mean(axis=0), rows),
        scores=score(samples, rows.action, rows.action_std, rows.bootstrap),
        calibration=calibrate(many, truth, rows.action_std, bootstrap, seed),
    ), None


def _noise_floor(store: TransitionStore, rows: _Rows) -> NoiseFloor | None:
    """Estimate what neighbours among the training rows leave open, on the residual of the linear inverse.

    Training rows themselves have no such estimate: the nearest neighbour of each would be the row itself.
    """
    others = store.load_spread("train", REFERENCES, columns=COLUMNS)
    columns, _, _ = rows.spread(QUERIES)
    if len(others["state"]) <= NEIGHBOURS:
        return None
    linear = linear_baseline(store)
    context, residual = _encode(linear, columns)
    other_context, other_residual = _encode(linear, others)
    return estimate_noise_floor(context, residual, other_context, other_residual, rows.action_std)


def _encode(linear: LinearInverse, columns: Columns) -> tuple[Float[np.ndarray, "rows n"], Float[np.ndarray, "rows m"]]:
    """Return the standardised features, and what the linear inverse leaves of the action in its units."""
    state, next_state = _tensors(columns, np.s_[:], linear.device)
    context, mean = linear.encode_transition(state, next_state)
    return context.double().numpy(), flat_actions(columns["action"]) - mean.numpy()


def _flat_samples(samples: Float[np.ndarray, "samples rows ..."]) -> Float[np.ndarray, "samples rows dims"]:
    return samples.reshape(*samples.shape[:2], -1).astype(np.float64)


def _sample(
    variant: _Variant, columns: Columns, num_samples: int, seed: int, device: torch.device
) -> Float[np.ndarray, "samples rows ..."]:
    """Return (num_samples, rows, [horizon,] action_dim) float32, in chunks of rows to bound the memory."""
    generator = torch.Generator(device).manual_seed(seed)
    chunks = []
    for first in range(0, len(columns["state"]), SAMPLE_CHUNK_ROWS):
        state, next_state = _tensors(columns, np.s_[first : first + SAMPLE_CHUNK_ROWS], device)
        actions = variant.model.sample(
            state,
            next_state,
            num_samples,
            num_inference_steps=variant.num_inference_steps,
            generator=generator,
            allow_unvalidated=True,
        )
        chunks.append(actions.cpu().numpy())
    return np.concatenate(chunks, axis=1)


def _predict_batch(variant: _Variant, rows: _Rows, device: torch.device, batch: int) -> Tensor:
    """Predict the first `batch` rows, repeated when there are fewer: from arrays on the host, as a user would."""
    chosen = np.resize(np.arange(len(rows.action)), batch)
    state, next_state = _tensors(rows.columns, chosen, device)
    steps = variant.num_inference_steps
    return variant.model.sample(state, next_state, num_inference_steps=steps, allow_unvalidated=True)


def _tensors(
    columns: Columns, index: slice | Num[np.ndarray, " chosen"], device: torch.device
) -> tuple[Tensor, Tensor]:
    state, next_state = (torch.from_numpy(columns[name][index]).to(device) for name in ("state", "next_state"))
    return state, next_state


def _errors(prediction: Float[np.ndarray, "rows dims"], rows: _Rows) -> Errors:
    per_dim = nrmse_per_dim(prediction, rows.action, rows.action_std)
    r2 = r2_per_dim(prediction, rows.action)
    varies = rows.action_std > 0
    squared = np.square(((prediction - rows.action) / rows.action_std)[:, varies]).mean(axis=1)
    return Errors(
        nrmse=nrmse(prediction, rows.action, rows.action_std),
        nrmse_interval=rows.bootstrap.interval(squared, np.sqrt),
        nrmse_per_dim=tuple(per_dim.tolist()),
        rmse_per_dim=tuple(rmse_per_dim(prediction, rows.action).tolist()),
        r2=float(np.nanmean(r2)) if not np.isnan(r2).all() else float("nan"),
        r2_per_dim=tuple(r2.tolist()),
    )


def _simulate(rows: _Rows, action: Num[np.ndarray, "rows ..."]) -> tuple[Simulated, str | None]:
    """Compare actions with the exact ones, and the states they lead to with the recorded next states."""
    state, next_state = rows.columns["state"], rows.columns["next_state"]
    sequence = action.reshape(len(action), -1, action.shape[-1])
    exact_nrmse = None
    if rows.exact is not None:
        std, trusted = rows.action_std[: rows.exact.action.shape[1]], rows.exact.trusted
        exact_nrmse = nrmse(sequence[trusted, 0], rows.exact.action[trusted], std)
    force_nrmse = _force_error(rows, sequence[:, 0])
    reached, reason = reached_states(rows.simulator, state, sequence, next_state, rows.gap)
    if reached is None:
        return Simulated(exact_nrmse, None, force_nrmse), reason
    per_dim = nrmse_per_dim(reached, next_state, rows.change_std)
    round_trip = RoundTrip(nrmse(reached, next_state, rows.change_std), tuple(per_dim.tolist()))
    return Simulated(exact_nrmse, round_trip, force_nrmse), None


def _force_error(rows: _Rows, action: Num[np.ndarray, "rows action_dim"]) -> float | None:
    """Return the RMSE / std of the force of some actions, where the exact posterior gives the force."""
    posterior = rows.simulator.posterior
    if posterior is None:
        return None
    next_state = rows.columns["next_state"]
    exact = posterior.force(current_state(rows.columns["state"], next_state), next_state.astype(np.float64))
    error = posterior.force_of(action) - exact
    return float(np.sqrt(np.mean(np.square(error))) / exact.std())
