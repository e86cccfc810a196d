"""What a dataset YAML says: where the recording is, what a row is, how it is split, and how it is collected."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from invdyn.config import Config
from invdyn.envs.collect_config import CollectConfig
from invdyn.errors import ConfigError
from invdyn.storage import absolute, is_url, join
from invdyn.transitions.filters import FiltersConfig

SEQUENCE_PART = "/sequence/"
TRANSITION_PART = "/inverse_dynamics/"

Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]


class KeyMeta(Config):
    """Shape of one key of a recording; `shape` is checked against the files when given."""

    shape: tuple[int, ...] | None = None
    type: str | None = None


class ShapeMeta(Config):
    """Which keys make the state, in order, and the action."""

    obs: dict[str, KeyMeta] = Field(min_length=1)
    action: KeyMeta = KeyMeta()
    action_key: str | None = None


class DatasetConfig(Config):
    """A dataset: recording in, transitions out.

    Attributes:
        name: identity of the dataset; part of the hash that splits the episodes.
        storage: shared folder or URL that relative paths lie below, those of runs included (docs/storage.md); the
            working folder when None.
        buffer_path: folder or file of the recording, or its URL.
        output_path: folder of the transitions; by default `buffer_path` with /sequence/ replaced by /inverse_dynamics/.
        format: format of the recording, when it should not be found from the files.
        format_options: further options of the format's reader (docs/formats/).
        shape_meta: keys of the state and the action.
        splits: "hashed" to split the episodes by ratio, "recorded" to take the split that the recording names.
        val_ratio: share of episodes for validation.
        test_ratio: share of episodes for the final test.
        gap: steps from state to next_state.
        horizon: actions per row, from the state's own step on.
        history: past states given beside the current one.
        filters: which episodes, rows and dimensions are left out (docs/filters.md).
        part_size_mb: size of the recording's slice that one task extracts, in MB; of many small files, at most 256.
        collect: how to record the sequences in simulation.
    """

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    storage: str | None = Field(default=None, min_length=1)
    buffer_path: str = Field(min_length=1)
    output_path: str | None = None
    format: str | None = None
    format_options: dict[str, Any] = Field(default_factory=dict)
    shape_meta: ShapeMeta | None = None
    splits: Literal["hashed", "recorded"] = "hashed"
    val_ratio: Ratio = 0.1
    test_ratio: Ratio = 0.1
    gap: int = Field(default=1, ge=1)
    horizon: int = Field(default=1, ge=1)
    history: int = Field(default=0, ge=0)
    filters: FiltersConfig = FiltersConfig()
    part_size_mb: float = Field(default=128.0, gt=0)
    collect: CollectConfig | None = None

    @model_validator(mode="after")
    def _leave_training_rows(self) -> DatasetConfig:
        if self.val_ratio + self.test_ratio >= 1.0:
            raise ValueError("val_ratio + test_ratio must be below 1")
        return self

    def below_storage(self, path: str) -> str:
        """Return the absolute path or URL of a path below `storage`; an absolute one is its own."""
        if self.storage is None or is_url(path) or Path(path).expanduser().is_absolute():
            return absolute(path)
        return join(absolute(self.storage), path)

    @property
    def sequence_path(self) -> str:
        """Absolute path or URL of the recording."""
        return self.below_storage(self.buffer_path)

    @property
    def transitions_path(self) -> str:
        """Absolute path or URL of the transitions folder.

        Raises:
            ConfigError: when neither `output_path` is given nor `buffer_path` contains /sequence/.
        """
        if self.output_path is not None:
            return self.below_storage(self.output_path)
        before, found, after = self.sequence_path.rstrip("/").rpartition(SEQUENCE_PART)
        if not found:
            raise ConfigError(
                f"buffer_path must contain {SEQUENCE_PART!r} to derive the transitions folder, got "
                f"{self.buffer_path!r}; give output_path"
            )
        return before + TRANSITION_PART + after

    @property
    def state_keys(self) -> tuple[str, ...] | None:
        """Observation keys that make the state, or None for the format's default."""
        return tuple(self.shape_meta.obs) if self.shape_meta else None
