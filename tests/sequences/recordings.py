"""What the tests of recordings share: small native shards, written for the test that reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Episode = tuple[np.ndarray, np.ndarray]


def make_episodes(
    lengths: Iterable[int],
    *,
    state_dim: int = 3,
    action_dim: int = 2,
    states_after: int = 1,
    dtype: Any = np.float64,
    seed: int = 0,
) -> list[Episode]:
    """Episodes of `lengths` actions, each with `states_after` states more, of random numbers all different."""
    generator = np.random.default_rng(seed)

    def draw(rows: int, columns: int) -> np.ndarray:
        return (generator.normal(size=(rows, columns)) * 100).astype(dtype)

    return [(draw(length + states_after, state_dim), draw(length, action_dim)) for length in lengths]


def write_shard(
    path: Path,
    episodes: Sequence[Episode],
    *,
    arrays: dict[str, Any] | None = None,
    without: Iterable[str] = (),
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Write episodes as one native shard.

    Args:
        path: the file.
        episodes: (states, actions) each.
        arrays: datasets by their path in the file, added or put in the place of the right ones.
        without: paths of datasets to leave out.
        attributes: facts of the recording.
    """
    states, actions = [s for s, _ in episodes], [a for _, a in episodes]
    content: dict[str, Any] = {
        "data/state": np.concatenate(states) if states else np.zeros((0, 3)),
        "data/action": np.concatenate(actions) if actions else np.zeros((0, 2)),
        "meta/state_ends": np.cumsum([len(s) for s in states], dtype=np.int64),
        "meta/episode_ends": np.cumsum([len(a) for a in actions], dtype=np.int64),
        **(arrays or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in content.items():
            if name not in without:
                file.create_dataset(name, data=values, track_times=False)
        file.attrs.update(attributes or {})
    return path


def write_recording(folder: Path, episodes: Sequence[Episode], *, episodes_per_shard: int = 4) -> Path:
    """Write episodes as a folder of native shards."""
    for index, first in enumerate(range(0, len(episodes), episodes_per_shard)):
        write_shard(folder / f"shard-{index:05d}.hdf5", episodes[first : first + episodes_per_shard])
    return folder
