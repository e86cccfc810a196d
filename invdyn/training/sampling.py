"""The end of training a flow: calibrate its spreads, choose its solver and steps, write both into its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from invdyn.evaluation.metrics import varying_std
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
from invdyn.transitions.store import TransitionStore

UNSETTLED = (
    "no validation rows: the solver and number of steps are not chosen, and not calibrated: {model.solver} x "
    "{model.num_inference_steps}"
)

CHOICE_ROWS = 1024
"""Validation rows that every setting is judged by."""

CALIBRATION_ROWS = 8_192
CALIBRATION_EVALUATIONS = 65_536
"""What the last calibration of the chosen setting may take: 2,048 rows at 32 network evaluations, or 8,192 at 8."""


def settle_sampling(config: RunConfig, model: InverseDynamics, store: TransitionStore) -> str | None:
    """Write `sampling.json` into the best and the last checkpoint of a run; needs validation rows.

    A number of steps that the config fixes is kept, and is then the only one that is validated.

    Args:
        config: the run.
        model: that of the last checkpoint, in eval mode; it samples as settled from now on.
        store: the dataset, whose validation rows it is judged by.

    Returns:
        How the model samples where nothing could be chosen, in words; else None.
    """
    found = list_checkpoints(config.run_dir)
    if not found or not isinstance(model, FlowInverseDynamics):
        return None
    assert isinstance(config.model, FlowConfig)
    fixed = config.model.num_inference_steps
    if not store.num_rows("val"):
        return None if fixed is not None else UNSETTLED.format(model=model)
    settings = CANDIDATES if fixed is None else (SamplingSetting(config.model.solver, fixed),)
    for folder in dict.fromkeys([find_checkpoint(config.run_dir), found[-1]]):
        of_folder = model if folder == found[-1] else load_checkpoint(folder, str(model.device)).model
        assert isinstance(of_folder, FlowInverseDynamics)
        if (folder / SAMPLING_FILE).is_file():  # settled before the run was continued
            apply_sampling(of_folder, folder)
            continue
        chosen, curve = _settle(of_folder, store, settings, config.training.seed)
        write_sampling(folder, chosen, [asdict(quality) for quality in curve])
        apply_sampling(of_folder, folder)
    return None


def _settle(
    model: FlowInverseDynamics, store: TransitionStore, settings: Sequence[SamplingSetting], seed: int
) -> tuple[SamplingSetting, list[SettingQuality]]:
    """Return the setting to sample with and the quality of all.

    All are judged by the same few rows. On so few, regions that hold 88% are not proven to hold less than 90%, so the
    chosen setting is calibrated again on more.
    """
    std = varying_std(store.moments, slice(model.context_dim, None))
    curve = quality_of_settings(model, _some_rows(store, CHOICE_ROWS, model), std, settings, seed)
    chosen = choose_setting(curve)
    limit = min(CALIBRATION_ROWS, CALIBRATION_EVALUATIONS // network_evaluations(chosen))
    if min(limit, store.num_rows("val")) > CHOICE_ROWS:
        more = _some_rows(store, limit, model)
        curve = [calibrate_again(model, more, std, q, seed) if q.setting == chosen else q for q in curve]
    return chosen, curve


def _some_rows(store: TransitionStore, limit: int, model: FlowInverseDynamics) -> dict[str, Tensor]:
    """Return at most `limit` validation rows, evenly spaced, on the model's device."""
    rows = store.load_spread("val", limit, columns=("state", "action", "next_state"))
    return {name: torch.from_numpy(values).to(model.device) for name, values in rows.items()}
