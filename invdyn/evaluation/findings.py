"""What a reader of an evaluation should be told without reading its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    own = evaluation.default_of(evaluation.subject)
    if not math.isfinite(own.one_sample.nrmse):
        return [f"{own.label}: the predictions are not finite. Train again with a lower learning rate."]
    found = []
    # The mean of N draws of a right distribution that the transition says nothing about has an R² of -1 / N.
    lowest = -2.0 / evaluation.num_samples
    negative = [i for i, value in enumerate(own.mean_of_samples.r2_per_dim) if value < lowest]
    if negative:
        found.append(
            f"{own.label}: R² is below 0 for action dimension {list_dims(negative)}: "
            "worse than always answering the mean action."
        )
    for other in (evaluation.default_of(model) for model in evaluation.models if model != evaluation.subject):
        tolerance = 1.0 if other.model == LINEAR else PEER_TOLERANCE
        if own.energy_score > tolerance * other.energy_score:
            numbers = f"energy score {own.energy_score:.3g} against {other.energy_score:.3g}"
            found.append(f"{own.label} is worse than the {other.label} baseline: {numbers}.")
    best = min(evaluation.of_model(evaluation.subject), key=lambda result: result.energy_score)
    if evaluation.steps_chosen and own.energy_score > MUCH_WORSE * best.energy_score:
        found.append(
            f"{best.label} would be better than the model's own number of steps: energy score "
            f"{best.energy_score:.3g} against {own.energy_score:.3g}. Set num_inference_steps to "
            f"{best.num_inference_steps}."
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
        found.append(f"Action dimension {list_dims(constant)} is constant in the training rows, and left out.")
    floor = evaluation.recorded.round_trip
    if floor is not None and floor.nrmse > SIMULATOR_TOLERANCE:
        found.append(
            f"The recorded actions themselves miss the recorded next states in {evaluation.env_id} by "
            f"{floor.nrmse:.2g} std: contacts, hidden state, or another simulator. No model can do better."
        )
    return found


def list_dims(dims: Sequence[object], limit: int = 8) -> str:
    """Return names in one line, the first few of many.

    Example:
        >>> list_dims([0, 3, 4], limit=2)
        '0, 3 and 1 more'
    """
    text = ", ".join(map(str, dims[:limit]))
    return text + (f" and {len(dims) - limit} more" if len(dims) > limit else "")
