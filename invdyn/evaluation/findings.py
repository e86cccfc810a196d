"""What a reader of an evaluation should be told without reading its tables."""

from __future__ import annotations

import math

from invdyn.evaluation.results import Evaluation

FEW_ROWS = 100
MUCH_WORSE = 1.2
PEER_TOLERANCE = 1.3
SIMULATOR_TOLERANCE = 0.1
LINEAR, MLP = "linear", "mlp"


def warnings(evaluation: Evaluation) -> list[str]:
    """Return one sentence for each thing that makes the numbers bad or doubtful; none when all is well."""
    return [*_about_model(evaluation), *_about_rows(evaluation)]


def _about_model(evaluation: Evaluation) -> list[str]:
    own, best = evaluation.default_of(evaluation.subject), evaluation.best_of(evaluation.subject)
    error = own.one_sample.nrmse
    if not math.isfinite(error):
        return [f"{own.label}: the predictions are not finite. Train again with a lower learning rate."]
    found = []
    negative = [i for i, value in enumerate(own.one_sample.r2_per_dim) if value < 0]
    if negative:
        found.append(
            f"{own.label}: R² is below 0 for action dimension {_list(negative)}: "
            "worse than always answering the mean action."
        )
    score = min(error, own.mean_of_samples.nrmse)
    for other in (evaluation.default_of(model) for model in evaluation.models if model != evaluation.subject):
        tolerance = 1.0 if other.model == LINEAR else PEER_TOLERANCE
        if score > tolerance * other.one_sample.nrmse:
            how = "" if score == error else f" (mean of {evaluation.num_samples})"
            numbers = f"RMSE / std {score:.3g}{how} against {other.one_sample.nrmse:.3g}"
            found.append(f"{own.label} is worse than the {other.label} baseline: {numbers}.")
    if error > MUCH_WORSE * best.one_sample.nrmse:
        found.append(
            f"{best.label} would be better than the model's own number of steps: RMSE / std "
            f"{best.one_sample.nrmse:.3g} against {error:.3g}. Set num_inference_steps to {best.num_inference_steps}."
        )
    return found


def _about_rows(evaluation: Evaluation) -> list[str]:
    found = []
    if evaluation.split == "train":
        found.append("These rows were used for training: the numbers say nothing about new recordings.")
    if evaluation.num_rows < FEW_ROWS:
        found.append(f"Only {evaluation.num_rows} rows were evaluated: expect the numbers to change with more.")
    constant = [i for i, value in enumerate(evaluation.results[0].one_sample.nrmse_per_dim) if math.isnan(value)]
    if constant and math.isfinite(evaluation.results[0].one_sample.nrmse):
        found.append(f"Action dimension {_list(constant)} is constant in the training rows, and left out.")
    floor = evaluation.recorded.round_trip
    if floor is not None and floor.nrmse > SIMULATOR_TOLERANCE:
        found.append(
            f"The recorded actions themselves miss the recorded next states in {evaluation.env_id} by "
            f"{floor.nrmse:.2g} std: contacts, hidden state, or another simulator. No model can do better."
        )
    return found


def _list(dims: list[int], limit: int = 8) -> str:
    return ", ".join(map(str, dims[:limit])) + (f" and {len(dims) - limit} more" if len(dims) > limit else "")
