"""The end of training a flow: calibrate its spreads, choose its solver and steps, write both into its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import torch

from invdyn.evaluation.sampling_choice import (
    CANDIDATES,
    SettingQuality,
    choose_setting,
    quality_of_settings,
)
from invdyn.models.base import InverseDynamics
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting
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
"""Validation rows that every setting is judged by. The spread of the chosen one is calibrated on all of them."""


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
    chosen setting is calibrated again on all rows there are.
    """
    count = len(validation.encoded[0])
    index = np.linspace(0, count - 1, min(count, CHOICE_ROWS)).astype(np.int64)
    rows = {name: values[torch.from_numpy(index).to(values.device)] for name, values in validation.rows.items()}
    curve = quality_of_settings(model, rows, validation.action_std, settings, seed)
    chosen = choose_setting(curve)
    if count > CHOICE_ROWS:
        (again,) = quality_of_settings(model, validation.rows, validation.action_std, [chosen], seed)
        settled = {name: getattr(again, name) for name in ("spread", "coverage_90", "coverage_error")}
        curve = [replace(quality, **settled) if quality.setting == chosen else quality for quality in curve]
    return chosen, curve
