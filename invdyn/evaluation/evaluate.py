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
from invdyn.evaluation.metrics import (
    energy_score,
    flat_actions,
    nrmse,
    nrmse_per_dim,
    r2_per_dim,
    varying_std,
)
from invdyn.evaluation.results import Errors, Evaluation, Result, RoundTrip, Simulated
from invdyn.evaluation.simulation import (
    ExactActions,
    RecordedSimulator,
    exact_actions,
    reached_states,
    recorded_simulator,
)
from invdyn.evaluation.speed import Speed, measure_speed
from invdyn.models.base import InverseDynamics
from invdyn.models.flow import FlowInverseDynamics
from invdyn.models.linear import LinearInverse
from invdyn.models.solvers import get_solver
from invdyn.transitions.store import TransitionStore

STEP_COUNTS = (1, 2, 4, 8, 16, 32)
NUM_SAMPLES = 8
MAX_ROWS = 20_000
EXAMPLE_ROWS = 2_000
SAMPLE_CHUNK_ROWS = 4_096

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
    action_std: Float[np.ndarray, " dims"]
    change_std: Float[np.ndarray, " state_dim"]
    gap: int
    simulator: RecordedSimulator
    exact: ExactActions | None
    exact_reason: str | None


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
    if num_samples < 2 or min(step_counts, default=1) < 1 or max_rows < 1:
        raise ConfigError(
            "num_samples must be 2 or more, step counts and max_rows 1 or more; got "
            f"{num_samples}, {list(step_counts)} and {max_rows}"
        )
    for name, model in models.items():
        check_dimensions(name, model, store)
    device = torch.device(device)
    rows = _load_rows(store, split, max_rows, seed)
    variants = [v for name, model in models.items() for v in _variants(name, model.to(device).eval(), step_counts)]
    speed = measure_speed({v.key: partial(_predict_batch, v, rows, device) for v in variants}, device)
    results = tuple(_evaluate_variant(v, rows, num_samples, seed, speed[v.key], device) for v in variants)
    recorded, round_trip_reason = _simulate(rows, rows.columns["action"])
    return Evaluation(
        split=split,
        num_rows=len(rows.action),
        num_samples=num_samples,
        seed=seed,
        device=str(device),
        cpu_threads=torch.get_num_threads(),
        env_id=rows.simulator.env_id,
        recorded=recorded,
        exact_rows=int(rows.exact.trusted.sum()) if rows.exact else 0,
        exact_reason=rows.exact_reason,
        round_trip_reason=round_trip_reason,
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


def _load_rows(store: TransitionStore, split: str, max_rows: int, seed: int) -> _Rows:
    available = store.num_rows(split)
    if available == 0:
        raise DataError(f"the {split} split must have rows, {store.path} has none; evaluate another split with --split")
    columns = store.load(split, columns=("state", "action", "next_state"))
    if available > max_rows:
        chosen = np.sort(np.random.default_rng(seed).choice(available, max_rows, replace=False))
        columns = {name: values[chosen] for name, values in columns.items()}
    num_features = (store.history + 2) * store.state_dim
    simulator = recorded_simulator(store)
    exact, exact_reason = exact_actions(simulator, columns["state"], columns["next_state"])
    return _Rows(
        columns=columns,
        action=flat_actions(columns["action"]),
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
    variant: _Variant, rows: _Rows, num_samples: int, seed: int, speed: Speed, device: torch.device
) -> Result:
    samples = _sample(variant, rows.columns, num_samples, seed, device)
    flat = samples.reshape(num_samples, len(rows.action), -1).astype(np.float64)
    return Result(
        model=variant.name,
        num_inference_steps=variant.num_inference_steps,
        network_evaluations=variant.network_evaluations,
        is_default=variant.is_default,
        one_sample=_errors(flat[0], rows),
        mean_of_samples=_errors(flat.mean(axis=0), rows),
        energy_score=energy_score(flat, rows.action, rows.action_std),
        simulated=_simulate(rows, samples[0])[0],
        speed=speed,
        examples=flat[0, :EXAMPLE_ROWS],
    )


def _sample(
    variant: _Variant, columns: Columns, num_samples: int, seed: int, device: torch.device
) -> Float[np.ndarray, "samples rows ..."]:
    """Return (num_samples, rows, [horizon,] action_dim) float32, in chunks of rows to bound the memory."""
    generator = torch.Generator(device).manual_seed(seed)
    chunks = []
    for first in range(0, len(columns["state"]), SAMPLE_CHUNK_ROWS):
        state, next_state = _tensors(columns, np.s_[first : first + SAMPLE_CHUNK_ROWS], device)
        actions = variant.model.sample(
            state, next_state, num_samples, num_inference_steps=variant.num_inference_steps, generator=generator
        )
        chunks.append(actions.cpu().numpy())
    return np.concatenate(chunks, axis=1)


def _predict_batch(variant: _Variant, rows: _Rows, device: torch.device, batch: int) -> Tensor:
    """Predict the first `batch` rows, repeated when there are fewer: from arrays on the host, as a user would."""
    chosen = np.resize(np.arange(len(rows.action)), batch)
    state, next_state = _tensors(rows.columns, chosen, device)
    return variant.model.sample(state, next_state, num_inference_steps=variant.num_inference_steps)


def _tensors(
    columns: Columns, index: slice | Num[np.ndarray, " chosen"], device: torch.device
) -> tuple[Tensor, Tensor]:
    state, next_state = (torch.from_numpy(columns[name][index]).to(device) for name in ("state", "next_state"))
    return state, next_state


def _errors(prediction: Float[np.ndarray, "rows dims"], rows: _Rows) -> Errors:
    per_dim = nrmse_per_dim(prediction, rows.action, rows.action_std)
    r2 = r2_per_dim(prediction, rows.action)
    return Errors(
        nrmse=nrmse(prediction, rows.action, rows.action_std),
        nrmse_per_dim=tuple(per_dim.tolist()),
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
    reached, reason = reached_states(rows.simulator, state, sequence, next_state, rows.gap)
    if reached is None:
        return Simulated(exact_nrmse, None), reason
    per_dim = nrmse_per_dim(reached, next_state, rows.change_std)
    round_trip = RoundTrip(nrmse(reached, next_state, rows.change_std), tuple(per_dim.tolist()))
    return Simulated(exact_nrmse, round_trip), None
