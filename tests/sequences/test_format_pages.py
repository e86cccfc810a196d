"""The config on each format's page reads a recording of that format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from invdyn.sequences.registry import READERS, open_sequences
from invdyn.transitions.dataset_config import DatasetConfig
from tests.sequences import writers
from tests.sequences.writers import Episode, make_episodes


def page_config(repository: Path, format_name: str) -> dict[str, Any]:
    """Return the YAML block of a page."""
    text = (repository / f"docs/formats/{format_name}.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    values: dict[str, Any] = yaml.safe_load(block)
    return values


def write_robomimic_keys(folder: Path, episodes: list[Episode]) -> Path:
    path = writers.write_robomimic(folder, episodes)
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo["obs/robot0_eef_pos"] = demo["obs/state"][:, :2]
            demo["obs/object"] = demo["obs/state"][:, 2:]
    return path


WRITE = {
    "native": writers.write_native,
    "robomimic": write_robomimic_keys,
    "d4rl": writers.write_d4rl,
    "ogbench": writers.write_ogbench,
    "minari": writers.write_minari,
    "lerobot": writers.write_lerobot_v2,
    "diffusion_policy": writers.write_zarr,
    "csv": writers.write_csv,
}


@pytest.mark.parametrize("format_name", READERS)
def test_config_on_the_page(format_name: str, repository: Path, tmp_cwd: Path) -> None:
    if format_name == "diffusion_policy":
        pytest.importorskip("zarr")
    config = DatasetConfig.model_validate(page_config(repository, format_name))
    assert config.transitions_path
    target = Path(config.buffer_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = WRITE[format_name](tmp_cwd / "written", make_episodes([12, 9]))
    written.rename(target)
    reader = open_sequences(config.sequence_path, state_keys=config.state_keys)
    assert reader.format_name == format_name
    plan = reader.inspect()
    assert plan.num_episodes == 2
    assert np.isfinite(reader.read(plan.by_file()[0]).state).all()


@pytest.mark.parametrize("format_name", READERS)
def test_page_has_the_command_for_its_config(format_name: str, repository: Path) -> None:
    name = page_config(repository, format_name)["name"]
    text = (repository / f"docs/formats/{format_name}.md").read_text(encoding="utf-8")
    assert f"    python experiments/create_dataset.py --config {name}.yaml\n" in text
