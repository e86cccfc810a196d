"""The end of training a flow: calibrate its spreads, choose its solver and steps, write both into its checkpoints."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from invdyn.evaluation.sampling_choice import (
    CANDIDATES,
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

MAX_ROWS = 1024


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
    index = np.linspace(0, len(validation.encoded[0]) - 1, min(len(validation.encoded[0]), MAX_ROWS)).astype(np.int64)
    rows = {name: values[torch.from_numpy(index).to(values.device)] for name, values in validation.rows.items()}
    fixed = config.model.num_inference_steps
    settings = CANDIDATES if fixed is None else (SamplingSetting(config.model.solver, fixed),)
    for folder in dict.fromkeys([find_checkpoint(config.run_dir), found[-1]]):
        of_folder = model if folder == found[-1] else load_checkpoint(folder, str(model.device)).model
        assert isinstance(of_folder, FlowInverseDynamics)
        if (folder / SAMPLING_FILE).is_file():  # settled before the run was continued
            apply_sampling(of_folder, folder)
            continue
        curve = quality_of_settings(of_folder, rows, validation.action_std, settings, config.training.seed)
        write_sampling(folder, choose_setting(curve), [asdict(quality) for quality in curve])
        apply_sampling(of_folder, folder)
