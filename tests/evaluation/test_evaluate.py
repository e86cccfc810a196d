from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invdyn.envs.inverse import PhysicalInverse
from invdyn.envs.posterior import ActionPosterior
from invdyn.envs.replay import SimulatorReplay
from invdyn.errors import ConfigError, DataError
from invdyn.evaluation.evaluate import evaluate, linear_baseline
from invdyn.evaluation.findings import warnings
from invdyn.evaluation.results import Evaluation
from invdyn.evaluation.summary import headline_cards, summary_table
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting
from invdyn.models.linear import LinearInverse
from invdyn.transitions.store import TransitionStore
from tests.evaluation.pendulum import ENV_ID, ENV_KWARGS, extract, record_pendulum, write_native


class ExactModel(LinearInverse):
    """Answers with the physical inverse, plus a constant error."""

    error = 0.0

    def sample(self, state: Any, next_state: Any, num_samples: int = 1, **options: Any) -> torch.Tensor:
        inverse = PhysicalInverse(ENV_ID, ENV_KWARGS)
        exact = inverse(state[:, -4:].double().numpy(), next_state.double().numpy()) + self.error
        return torch.from_numpy(exact).float().expand(num_samples, -1, -1)


class WrongModel(ExactModel):
    error = 0.1


class PosteriorModel(LinearInverse):
    """Draws from the exact posterior of the two-factor pendulum."""

    def sample(self, state: Any, next_state: Any, num_samples: int = 1, **options: Any) -> torch.Tensor:
        posterior = ActionPosterior("InvertedPendulumTwoFactor-v5")
        arrays = (state.double().numpy(), next_state.double().numpy())
        return torch.from_numpy(posterior.sample(*arrays, num_samples, np.random.default_rng(num_samples))).float()


def flow_of(store: TransitionStore, **options: Any) -> FlowInverseDynamics:
    torch.manual_seed(0)
    model = FlowInverseDynamics(
        store.state_dim, store.action_dim, 8, (16,), network="mlp", num_inference_steps=2, **options
    )
    model.fit_normalization(store.moments)
    return model


def test_the_round_trip_is_in_units_of_the_change_of_state(store: TransitionStore) -> None:
    train, rows = store.load("train"), store.load("test")
    change_std = (train["next_state"].astype(np.float64) - train["state"]).std(axis=0)
    reached = SimulatorReplay(ENV_ID, ENV_KWARGS)(rows["state"], rows["action"] + np.float32(WrongModel.error))
    expected = np.sqrt(np.mean(((reached - rows["next_state"]) / change_std) ** 2, axis=0))
    found = evaluate({"wrong": WrongModel(4, 1)}, store).results[0].simulated.round_trip
    assert found is not None
    np.testing.assert_allclose(found.nrmse_per_dim, expected, rtol=1e-3, atol=1e-6)
    assert found.nrmse == pytest.approx(np.sqrt(np.mean(expected**2)), rel=1e-3)


def without_times(evaluation: Evaluation) -> dict[str, Any]:
    values = evaluation.to_json()
    for result in values["results"]:
        result.pop("speed")
    return values


def test_the_exact_model_returns_to_the_recorded_state_and_a_wrong_one_does_not(store: TransitionStore) -> None:
    found = evaluate({"exact": ExactModel(4, 1), "wrong": WrongModel(4, 1)}, store)
    exact, wrong = found.results
    assert found.recorded.round_trip is not None
    assert exact.simulated.round_trip is not None
    assert wrong.simulated.round_trip is not None
    assert found.recorded.round_trip.nrmse < 2e-6
    assert exact.simulated.round_trip.nrmse < 2e-6
    assert wrong.simulated.round_trip.nrmse > 1e-2
    assert found.recorded.exact_nrmse is not None
    assert found.recorded.exact_nrmse < 2e-6
    assert exact.simulated.exact_nrmse == pytest.approx(0.0, abs=1e-6)
    assert exact.one_sample.nrmse < 2e-6
    expected = 0.1 / store.moments.std[-1]
    assert wrong.simulated.exact_nrmse == pytest.approx(expected, rel=1e-4)
    assert wrong.one_sample.nrmse == pytest.approx(expected, rel=1e-4)
    assert found.exact_rows == found.num_rows


def test_a_flow_is_evaluated_at_each_number_of_steps_and_its_own(store: TransitionStore) -> None:
    flow, linear = flow_of(store, solver="midpoint"), linear_baseline(store)
    found = evaluate({"flow": flow, "linear": linear}, store, step_counts=(4, 1))
    assert [(r.model, r.num_inference_steps, r.network_evaluations) for r in found.results] == [
        ("flow", 1, 2),
        ("flow", 2, 4),
        ("flow", 4, 8),
        ("linear", None, 0),
    ]
    assert found.default_of("flow").num_inference_steps == 2
    errors = {r.num_inference_steps: r.one_sample.nrmse for r in found.of_model("flow")}
    assert len(set(errors.values())) == 3
    assert found.subject == "flow"


def test_the_numbers_are_those_of_the_model(store: TransitionStore) -> None:
    linear = linear_baseline(store)
    rows = store.load("test")
    state, next_state = torch.from_numpy(rows["state"]), torch.from_numpy(rows["next_state"])
    error = linear.sample(state, next_state)[0].double().numpy() - rows["action"]
    result = evaluate({"linear": linear}, store).results[0]
    assert result.one_sample.nrmse == pytest.approx(np.sqrt(np.mean(error**2)) / store.moments.std[-1])
    assert result.one_sample.r2 == pytest.approx(1 - np.sum(error**2) / rows["action"].var() / len(error), rel=1e-6)
    assert result.energy_score == pytest.approx(np.abs(error).mean() / store.moments.std[-1])
    assert result.mean_of_samples.nrmse == pytest.approx(result.one_sample.nrmse, rel=1e-6)
    assert result.speed.actions_per_s > 0


def test_all_but_the_times_depends_on_the_seed_alone(store: TransitionStore) -> None:
    flow = flow_of(store)
    first, again, other = (
        without_times(evaluate({"flow": flow}, store, step_counts=(1,), seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first["results"] != other["results"]


def test_a_part_of_the_rows_is_drawn_by_the_seed(store: TransitionStore) -> None:
    linear = linear_baseline(store)
    first, again, other = (
        without_times(evaluate({"linear": linear}, store, max_rows=50, seed=seed)) for seed in (3, 3, 4)
    )
    assert first["num_rows"] == 50
    assert first == again
    assert first["results"] != other["results"]


def test_without_a_named_simulator_the_reason_is_given(tmp_path: Path) -> None:
    record_pendulum(tmp_path / "nameless", name_env=False)
    store = extract(tmp_path / "nameless")
    found = evaluate({"linear": linear_baseline(store)}, store)
    assert found.recorded == dataclasses.replace(found.recorded, exact_nrmse=None, round_trip=None)
    assert found.results[0].simulated.round_trip is None
    assert "does not name the simulator" in (found.round_trip_reason or "")
    assert "does not name the simulator" in (found.exact_reason or "")


def test_a_gap_needs_all_actions_up_to_the_next_state(recording: Path) -> None:
    alone = extract(recording, gap=2)
    found = evaluate({"linear": linear_baseline(alone)}, alone)
    assert "gap is 2" in (found.exact_reason or "")
    assert "2 steps ahead, a row holds 1 action" in (found.round_trip_reason or "")
    covered = extract(recording, gap=2, horizon=2, history=1)
    found = evaluate({"linear": linear_baseline(covered)}, covered)
    assert found.recorded.round_trip is not None
    assert found.recorded.round_trip.nrmse < 2e-6
    assert len(found.results[0].one_sample.nrmse_per_dim) == 2


def test_history_and_horizon_keep_the_exact_inverse_of_the_first_action(recording: Path) -> None:
    store = extract(recording, horizon=3, history=2)
    found = evaluate({"flow": flow_of(store, history=2, horizon=3)}, store, step_counts=(1,))
    assert found.recorded.exact_nrmse is not None
    assert found.recorded.exact_nrmse < 2e-6
    assert found.truth.shape[1] == found.results[0].examples.shape[1] == 3


def test_a_recording_of_another_simulator_is_noticed(recording: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    states, actions = generator.normal(size=(20, 9, 4)) * 0.1, generator.uniform(-0.5, 0.5, (20, 8, 1))
    write_native(tmp_path / "other", states, actions.astype(np.float32), {"env_id": ENV_ID, "env_kwargs": "{}"})
    store = extract(tmp_path / "other")
    texts = warnings(evaluate({"linear": linear_baseline(store)}, store))
    assert any("miss the recorded next states" in text for text in texts)


def test_a_simulator_of_other_dimensions_is_a_reason_not_a_failure(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    states, actions = generator.normal(size=(20, 9, 3)), generator.normal(size=(20, 8, 1)).astype(np.float32)
    write_native(tmp_path / "small", states, actions, {"env_id": ENV_ID, "env_kwargs": "{}"})
    store = extract(tmp_path / "small")
    found = evaluate({"linear": linear_baseline(store)}, store)
    assert "must have shape (rows, 4)" in (found.round_trip_reason or "")
    assert found.exact_reason is not None


def test_against_the_exact_posterior_of_many_right_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invdyn.evaluation.two_sample.STEPS", 300)
    env_id, generator = "InvertedPendulumTwoFactor-v5", np.random.default_rng(0)
    actions = generator.uniform(-1, 1, (200, 5, 2)).astype(np.float32)
    states = [generator.uniform(-0.1, 0.1, (200, 4))]
    for step in range(5):
        states.append(SimulatorReplay(env_id)(states[-1], actions[:, step]))
    write_native(tmp_path / "two", np.stack(states, axis=1), actions, {"env_id": env_id, "env_kwargs": "{}"})
    store = extract(tmp_path / "two", test_ratio=0.5)
    found = evaluate({"sampler": PosteriorModel(4, 2), "linear": linear_baseline(store)}, store)
    sampler, linear = found.results
    assert found.posterior is not None
    assert found.posterior.calibration.coverage_90 == pytest.approx(0.9, abs=0.06)
    assert sampler.energy_score == pytest.approx(found.posterior.scores.energy_score, rel=0.1)
    assert sampler.two_sample is not None
    assert sampler.two_sample.accuracy == pytest.approx(0.5, abs=0.08)
    assert linear.two_sample is not None
    assert linear.two_sample.accuracy > 0.9
    assert sampler.simulated.force_nrmse is not None
    assert sampler.simulated.force_nrmse < 1e-4
    assert linear.simulated.force_nrmse == pytest.approx(1.0, abs=0.1)
    assert linear.calibration.coverage_90 < 0.05
    assert not any("worse than" in text for text in warnings(found))
    table = summary_table(found)
    assert table.rows[-1][0] == "exact posterior (floor)"
    assert "C2ST" in table.header


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_training_rows_are_no_neighbours_of_themselves(split: str, store: TransitionStore) -> None:
    found = evaluate({"linear": linear_baseline(store)}, store, split=split)
    assert (found.noise_floor is None) == (split == "train")


def test_predictions_that_are_not_finite_are_reported(store: TransitionStore) -> None:
    broken = linear_baseline(store)
    broken.weight.fill_(float("nan"))
    found = evaluate({"broken": broken}, store)
    assert found.results[0].simulated.round_trip is None
    assert found.to_json()["results"][0]["one_sample"]["nrmse"] is None
    assert any("not finite" in text for text in warnings(found))
    assert headline_cards(found)[0].note == "Always answering the mean action scores 1."


def test_a_model_worse_than_the_linear_baseline_is_reported(store: TransitionStore) -> None:
    found = evaluate({"wrong": WrongModel(4, 1), "linear": linear_baseline(store)}, store)
    assert any("worse than the linear baseline" in text for text in warnings(found))
    found = evaluate({"exact": ExactModel(4, 1), "linear": linear_baseline(store)}, store)
    assert warnings(found) == []


def test_advice_about_the_number_of_steps_is_for_those_that_were_chosen(store: TransitionStore) -> None:
    """An unfinished run has chosen none, and goes on with its own once it has."""
    flow = flow_of(store)
    assert not evaluate({"flow": flow}, store, step_counts=(1,)).steps_chosen
    flow.use_sampling(SamplingSetting("euler", 4), [])
    found = evaluate({"flow": flow}, store, step_counts=(1,))
    assert found.steps_chosen
    own = found.default_of("flow")
    worse = dataclasses.replace(own, scores=dataclasses.replace(own.scores, energy_score=1e3))
    found = dataclasses.replace(found, results=tuple(worse if result is own else result for result in found.results))
    assert any("Set num_inference_steps to 1." in text for text in warnings(found))
    assert not any("num_inference_steps" in text for text in warnings(dataclasses.replace(found, steps_chosen=False)))


def test_bad_requests_are_refused(store: TransitionStore, tmp_path: Path, recording: Path) -> None:
    with pytest.raises(DataError, match="same dimensions: model 'm' has state_dim 3"):
        evaluate({"m": LinearInverse(3, 1)}, store)
    with pytest.raises(DataError, match="split must be one of"):
        evaluate({"m": linear_baseline(store)}, store, split="tset")
    with pytest.raises(ConfigError, match="num_samples must be 2 or more"):
        evaluate({"m": linear_baseline(store)}, store, num_samples=1)
    empty = extract(recording, test_ratio=0)
    with pytest.raises(DataError, match="the test split must have rows"):
        evaluate({"m": linear_baseline(empty)}, empty)
