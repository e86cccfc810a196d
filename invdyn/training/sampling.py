"""The end of training a flow: calibrate its spreads, choose its solver and steps, write both into its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from invdyn.evaluation.sampling_choice import (
    CANDIDATES,
    SettingQuality,
    calibrate_again,
    choose_setting,
    quality_of_settings,
)
from invdyn.models.base import InverseDynamics
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting, network_evaluations
from invdyn.models.registry import FlowConfig
from invdyn.training.checkpoint import (
    SAMPLING_FILE,
    apply_sampling,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    write_sampling,
)
from invdyn.training.run_config import RunConfig
from invdyn.training.validation import Validation

CHOICE_ROWS = 1024
"""Validation rows that every setting is judged by."""

CALIBRATION_EVALUATIONS = 65_536
"""Network evaluations per sample that the last calibration of the chosen setting may take: 4,096 rows at 16 each."""


def settle_sampling(config: RunConfig, model: InverseDynamics, validation: Validation) -> None:
    """Write `sampling.json` into the best and the last checkpoint of a run; needs validation rows.

    A number of steps that the config fixes is kept, and is then the only one that is validated.

    Args:
        config: the run.
        model: that of the last checkpoint, in eval mode; it samples as settled from now on.
        validation: the rows to judge by.
    """
    found = list_checkpoints(config.run_dir)
    if not found or not isinstance(model, FlowInverseDynamics) or len(validation.encoded[0]) == 0:
        return
    assert isinstance(config.model, FlowConfig)
    fixed = config.model.num_inference_steps
    settings = CANDIDATES if fixed is None else (SamplingSetting(config.model.solver, fixed),)
    for folder in dict.fromkeys([find_checkpoint(config.run_dir), found[-1]]):
        of_folder = model if folder == found[-1] else load_checkpoint(folder, str(model.device)).model
        assert isinstance(of_folder, FlowInverseDynamics)
        if (folder / SAMPLING_FILE).is_file():  # settled before the run was continued
            apply_sampling(of_folder, folder)
            continue
        chosen, curve = _settle(of_folder, validation, settings, config.training.seed)
        write_sampling(folder, chosen, [asdict(quality) for quality in curve])
        apply_sampling(of_folder, folder)


def _settle(
    model: FlowInverseDynamics, validation: Validation, settings: Sequence[SamplingSetting], seed: int
) -> tuple[SamplingSetting, list[SettingQuality]]:
    """Return the setting to sample with and the quality of all.

    All are judged by the same few rows. On so few, regions that hold 88% are not proven to hold less than 90%, so the
    chosen setting is calibrated again on more.
    """
    std = validation.action_std
    curve = quality_of_settings(model, _some_rows(validation, CHOICE_ROWS), std, settings, seed)
    chosen = choose_setting(curve)
    more = _some_rows(validation, CALIBRATION_EVALUATIONS // network_evaluations(chosen))
    if len(more["state"]) > CHOICE_ROWS:
        curve = [calibrate_again(model, more, std, q, seed) if q.setting == chosen else q for q in curve]
    return chosen, curve


def _some_rows(validation: Validation, limit: int) -> dict[str, Tensor]:
    """Return at most `limit` rows, evenly spaced."""
    count = len(validation.encoded[0])
    index = torch.from_numpy(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))
    return {name: values[index.to(values.device)] for name, values in validation.rows.items()}
