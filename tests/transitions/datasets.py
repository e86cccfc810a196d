"""What the tests of datasets share: a config for a small recording, and the bytes of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invdyn.transitions.dataset_config import DatasetConfig
from tests.sequences.recordings import Episode, make_episodes, write_recording

LENGTHS = (9, 4, 12, 7, 3, 10, 8, 5, 11, 6, 2, 9, 7, 4)
SMALL_PARTS_MB = 700 / 2**20  # two or three of these episodes each


def record(folder: Path, episodes: Sequence[Episode] | None = None) -> Path:
    """Write a recording where `config_of` looks for it."""
    return write_recording(folder / "sequence" / "r", episodes or make_episodes(LENGTHS))


def config_of(folder: Path, **values: Any) -> DatasetConfig:
    """A dataset of the recording that `record` writes."""
    defaults = {"name": "d", "buffer_path": str(folder / "sequence" / "r"), "part_size_mb": SMALL_PARTS_MB}
    return DatasetConfig.model_validate({**defaults, **values})


def contents(folder: str | Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
