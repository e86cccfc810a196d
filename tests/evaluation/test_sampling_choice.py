from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from invdyn.errors import TrainingDiverged
from invdyn.evaluation.metrics import energy_scores
from invdyn.evaluation.sampling_choice import (
    NUM_SAMPLES,
    SettingQuality,
    calibrate_again,
    choose_setting,
    quality_of_settings,
)
from invdyn.models import FlowInverseDynamics
from invdyn.models.flow import SamplingSetting
from tests.models.rows import make_rows, moments_of


def quality(solver: str, evaluations: int, excess: float, error: float = 0.0, coverage: float = 0.9) -> SettingQuality:
    return SettingQuality(solver, evaluations, evaluations, 0.0, 1 + excess, excess, error, 0.0, (1.0,), coverage, 0.01)


def test_the_cheapest_within_tolerance_is_chosen() -> None:
    curve = [quality("euler", 1, 0.2), quality("euler", 2, 0.00099), quality("angular_euler", 2, 0.00098)]
    best = quality("euler", 16, 0.0)
    assert choose_setting([*curve, best]) == SamplingSetting("angular_euler", 2)
    assert choose_setting([curve[0], quality("euler", 4, 0.002), best]) == SamplingSetting("euler", 16)
    assert choose_setting([quality("euler", 4, 0.002, error=0.0011), best]) == SamplingSetting("euler", 4)


def test_right_regions_come_before_few_evaluations() -> None:
    narrow, right = quality("euler", 2, 0.0, coverage=0.7), quality("angular_midpoint", 4, 0.08, coverage=0.92)
    right = replace(right, energy_excess=0.0)  # the best of those that are right
    assert choose_setting([narrow, right]).num_inference_steps == 4
    far_worse = quality("angular_euler", 1, 0.2, coverage=0.9)
    assert choose_setting([far_worse, narrow, right]).num_inference_steps == 4
    still_narrow = quality("angular_euler", 4, 0.0004, coverage=0.8)
    assert choose_setting([narrow, still_narrow]).num_inference_steps == 4


def test_regions_of_several_dimensions_are_calibrated_together() -> None:
    """Errors that are large in all dimensions at once: right intervals of each leave too much outside of all."""
    random = torch.Generator().manual_seed(5)
    rows = {"state": torch.zeros(4000, 3), "next_state": torch.zeros(4000, 3)}
    large = torch.where(torch.rand(4000, 1, generator=random) < 0.15, 3.0, 0.6)
    rows["action"] = large * torch.randn(4000, 2, generator=random)
    (found,) = quality_of_settings(gaussian_model(1.0), rows, np.ones(2), [SamplingSetting("angular_euler", 4)])
    assert found.coverage_90 == pytest.approx(0.9, abs=0.01)


def test_a_spread_that_is_not_proven_wrong_is_kept() -> None:
    for seed in (1, 2, 3):  # 1 of 40 is proven wrong by chance
        random = torch.Generator().manual_seed(seed)
        rows = {"state": torch.zeros(500, 3), "next_state": torch.zeros(500, 3)}
        rows["action"] = torch.randn(500, 2, generator=random)
        (found,) = quality_of_settings(gaussian_model(1.0), rows, np.ones(2), [SamplingSetting("angular_euler", 4)])
        assert found.spread == (1.0, 1.0)


def test_the_last_calibration_acts_on_less_proof() -> None:
    """Regions that hold 88.7% of 2,000 actions are 1.9 standard errors off: left at first, set right at last."""
    random = torch.Generator().manual_seed(2)
    rows = {"state": torch.zeros(2000, 3), "next_state": torch.zeros(2000, 3)}
    rows["action"] = 1.05 * torch.randn(2000, 2, generator=random)
    (first,) = quality_of_settings(gaussian_model(1.0), rows, np.ones(2), [SamplingSetting("angular_euler", 4)])
    last = calibrate_again(gaussian_model(1.0), rows, np.ones(2), first)
    assert first.spread == (1.0, 1.0)
    assert last.spread == pytest.approx((1.03, 1.03), abs=0.01)
    assert abs(last.coverage_90 - 0.9) < abs(first.coverage_90 - 0.9)


def gaussian_model(spread: float) -> FlowInverseDynamics:
    """N(0, spread^2) for every transition: the flow does nothing, and neither does the regression."""
    torch.manual_seed(0)
    model = FlowInverseDynamics(3, 2, 4, (8,), network="mlp", prediction="angular", base="mlp", base_dims=(8,))
    assert model.conditional is not None
    last = model.conditional.log_scale[-1]
    for layer in (model.network.output, model.conditional.mean, last):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.constant_(last.bias, float(torch.logit(torch.tensor(spread), eps=1e-6)))
    return model.eval()


def test_a_wrong_spread_is_calibrated() -> None:
    random = torch.Generator().manual_seed(5)
    rows = {"state": torch.zeros(2000, 3), "next_state": torch.zeros(2000, 3)}
    rows["action"] = torch.randn(2000, 2, generator=random) * torch.tensor([1.0, 0.5])
    model, setting = gaussian_model(1.0), SamplingSetting("angular_euler", 4)
    (found,) = quality_of_settings(model, rows, np.ones(2), [setting])
    assert found.spread == pytest.approx((1.0, 0.5), rel=0.1)
    assert found.coverage_90 == pytest.approx(0.9, abs=0.02)
    (own,) = quality_of_settings(model, rows, np.ones(2), [setting], calibrate=False)
    assert own.coverage_90 > 0.94
    assert own.energy_score > found.energy_score
    assert not model.spreads


@pytest.mark.parametrize("tails", [None, 1.0])
def test_what_is_judged_is_what_is_sampled(tails: float | None) -> None:
    """The energy score of the curve is that of the model's own samples of the same noise, its spread calibrated."""
    torch.manual_seed(0)
    options = {"network": "mlp", "prediction": "angular", "base": "mlp", "base_dims": (8,), "base_tails": tails}
    model = FlowInverseDynamics(3, 2, 4, (8,), **options).eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(model.network.output.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    rows = make_rows(rows=500)
    rows = rows._replace(action=2 * rows.action)
    (found,) = quality_of_settings(model, rows._asdict(), np.ones(2), [SamplingSetting("angular_euler", 2)])
    assert max(found.spread) > 1.5
    model.spreads = {found.setting: found.spread}
    noise = torch.randn(NUM_SAMPLES, 500, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = model.sample_from(rows.state, rows.next_state, noise, num_inference_steps=2, solver="angular_euler")
    score = energy_scores(drawn.double().numpy(), rows.action.double().numpy(), np.ones(2)).mean()
    assert score == pytest.approx(found.energy_score, rel=1e-5)


def test_settings_are_compared_with_the_finest_that_is_not_proven_worse() -> None:
    """Too few steps have the lowest score of these rows by chance: the right samples are not made out to be worse."""
    random = torch.Generator().manual_seed(3)
    rows = {"state": torch.zeros(60, 3), "next_state": torch.zeros(60, 3)}
    rows["action"] = torch.randn(60, 2, generator=random)
    settings = [SamplingSetting("euler", 4), SamplingSetting("angular_euler", 8)]
    few, many = quality_of_settings(gaussian_model(1.0), rows, np.ones(2), settings, calibrate=False)
    assert few.energy_score < many.energy_score
    assert few.energy_excess > many.energy_excess == 0.0


def test_settings_whose_samples_are_not_finite_are_left_out() -> None:
    model, rows = FlowInverseDynamics(3, 2, 4, (8,), network="mlp", prediction="velocity").eval(), make_rows(rows=50)
    settings = [SamplingSetting("euler", 1), SamplingSetting("euler", 16)]
    torch.nn.init.constant_(model.network.output.weight, 1e20)  # type: ignore[union-attr,arg-type]
    (found,) = quality_of_settings(model, rows._asdict(), np.ones(2), settings)
    assert found.setting == settings[0]
    torch.nn.init.constant_(model.network.output.weight, 1e38)  # type: ignore[union-attr,arg-type]
    torch.nn.init.constant_(model.network.output.bias, 3e38)  # type: ignore[union-attr,arg-type]
    with pytest.raises(TrainingDiverged, match=r"samples of a trained flow must be finite: .*; lower learning_rate"):
        quality_of_settings(model, rows._asdict(), np.ones(2), settings)


def test_samples_are_stretched_about_the_mean_of_the_flow() -> None:
    """The flow moves all noise by 3 (an angular field cos(angle) x_1 - sin(angle) x_0 that is fitted to a point)."""
    model, setting = gaussian_model(1.0), SamplingSetting("angular_euler", 1)
    torch.nn.init.constant_(model.network.output.bias, 3.0)  # type: ignore[union-attr,arg-type]
    states = torch.zeros(1, 3), torch.zeros(1, 3)
    noise = torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(0))
    plain = model.sample_from(*states, noise, num_inference_steps=1, solver="angular_euler")
    model.spreads = {setting: (1.0, 0.25)}
    stretched = model.sample_from(*states, noise, num_inference_steps=1, solver="angular_euler")
    torch.testing.assert_close(stretched[..., 0], plain[..., 0])
    torch.testing.assert_close(stretched[..., 1], 3.0 + 0.25 * (plain[..., 1] - 3.0))


def test_settings_are_judged_by_the_same_noise() -> None:
    """The flow that does nothing: an angular step is exact, a straight one loses the spread."""
    rows = make_rows(rows=500)
    model = gaussian_model(1.0)
    model.fit_normalization(moments_of(rows))
    settings = [SamplingSetting("euler", 1), SamplingSetting("angular_euler", 1), SamplingSetting("angular_euler", 4)]
    std = rows.action.std(dim=0).double().numpy()
    curve = quality_of_settings(model, rows._asdict(), std, settings)
    assert [q.network_evaluations for q in curve] == [1, 1, 4]
    assert curve[1].energy_score == pytest.approx(curve[2].energy_score)
    assert curve[0].energy_excess > 5 * curve[0].excess_error > 0
    assert min(q.energy_excess for q in curve) == 0.0
    assert curve[1].coverage_90 == pytest.approx(0.9, abs=0.03)
    assert curve[0].coverage_90 < 0.1
    assert choose_setting(curve) == SamplingSetting("angular_euler", 1)
    assert all(q.us_per_action > 0 for q in curve)
