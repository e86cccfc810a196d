from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invdyn.envs.collect_config import CollectConfig
from invdyn.envs.rollout import collect_shard
from invdyn.envs.shards import (
    MARKER_NAME,
    Shard,
    close_folder,
    encode_shard,
    list_shards,
    open_folder,
    write_atomically,
)
from invdyn.errors import ConfigError, DataError
from tests import remote as there
from tests.envs.tasks import PENDULUM


def config_of(**values: Any) -> CollectConfig:
    return CollectConfig.model_validate({"env_id": PENDULUM, "num_episodes": 3, "episodes_per_shard": 1, **values})


def fill(folder: Path, config: CollectConfig) -> None:
    for index in open_folder(folder, config):
        collect_shard(config, folder, index)
    close_folder(folder, config)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_values_same_bytes() -> None:
    shard = Shard.of([np.zeros((3, 2)), np.ones((2, 2))], [np.zeros((2, 1), np.float32), np.ones((1, 1), np.float32)])
    first = encode_shard(shard, {"seed": 1})
    time.sleep(1.1)  # HDF5 times are in seconds
    assert encode_shard(shard, {"seed": 1}) == first


def test_folder_that_is_finished_holds_shards_only(tmp_path: Path) -> None:
    fill(tmp_path / "a", config_of())
    assert sorted(contents(tmp_path / "a")) == ["shard-00000.hdf5", "shard-00001.hdf5", "shard-00002.hdf5"]


def test_continued_recording_keeps_finished_shards(tmp_path: Path) -> None:
    config = config_of()
    fill(tmp_path / "whole", config)
    folder = tmp_path / "stopped"
    assert open_folder(folder, config) == [0, 1, 2]
    collect_shard(config, folder, 1)
    (folder / ".shard-00002.hdf5.77.tmp").write_bytes(b"half")
    kept = (folder / "shard-00001.hdf5").stat().st_mtime_ns
    assert open_folder(folder, config) == [0, 2]
    fill(folder, config)
    assert contents(folder) == contents(tmp_path / "whole")
    assert (folder / "shard-00001.hdf5").stat().st_mtime_ns == kept


def test_a_recording_on_a_storage_service_is_the_one_on_a_disk(tmp_path: Path, remote: str) -> None:
    """Continued there too: the shard that is missing is made, and no other."""
    config = config_of()
    fill(tmp_path / "here", config)
    assert open_folder(remote, config) == [0, 1, 2]
    for index in (0, 2):
        collect_shard(config, remote, index)
    with pytest.raises(DataError, match=r"must hold 3 shards, 1 are not there \(first: shard-00001.hdf5\)"):
        close_folder(remote, config)
    assert open_folder(remote, config) == [1]
    collect_shard(config, remote, 1)
    close_folder(remote, config)
    assert there.contents(remote) == contents(tmp_path / "here")
    with pytest.raises(ConfigError, match="must not hold a recording yet, found 3 finished shards"):
        open_folder(remote, config)
    assert open_folder(remote, config, overwrite=True) == [0, 1, 2]
    assert list(there.contents(remote)) == [MARKER_NAME]


def test_finished_folder_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, config_of())
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"must not hold a recording yet, found 3 finished shards .*--overwrite"):
        open_folder(tmp_path, config_of())
    assert contents(tmp_path) == before


def test_other_config_is_refused(tmp_path: Path) -> None:
    open_folder(tmp_path, config_of())
    collect_shard(config_of(), tmp_path, 0)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"is of another config \(seed was 0, now 1\); .*--overwrite"):
        open_folder(tmp_path, config_of(seed=1))
    assert contents(tmp_path) == before


def test_other_version_of_mujoco_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder(tmp_path, config_of())
    monkeypatch.setattr("invdyn.envs.shards.mujoco.__version__", "0.1")
    with pytest.raises(ConfigError, match=r"mujoco_version was .*, now 0\.1"):
        open_folder(tmp_path, config_of())


def test_overwrite_removes_only_shards(tmp_path: Path) -> None:
    fill(tmp_path, config_of())
    for name in ("notes.txt", "shard-extra.hdf5", "shard-00000.hdf5.bak"):
        (tmp_path / name).write_text("mine")
    assert open_folder(tmp_path, config_of(num_episodes=2), overwrite=True) == [0, 1]
    assert sorted(contents(tmp_path)) == [MARKER_NAME, "notes.txt", "shard-00000.hdf5.bak", "shard-extra.hdf5"]


def test_interrupted_overwrite_is_not_a_finished_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, config_of())

    def stop(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            open_folder(tmp_path, config_of(), overwrite=True)
    assert len(list_shards(tmp_path)) == 3
    with pytest.raises(ConfigError, match="an overwrite was interrupted"):
        open_folder(tmp_path, config_of())
    assert open_folder(tmp_path, config_of(), overwrite=True) == [0, 1, 2]


def test_foreign_files_do_not_hinder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    fill(tmp_path, config_of())
    assert (tmp_path / "README.md").read_text() == "mine"


def test_missing_shards_are_noticed(tmp_path: Path) -> None:
    open_folder(tmp_path, config_of())
    collect_shard(config_of(), tmp_path, 0)
    with pytest.raises(DataError, match=r"must hold 3 shards, 2 are not there \(first: shard-00001.hdf5\)"):
        close_folder(tmp_path, config_of())
    assert (tmp_path / MARKER_NAME).exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "^disk full while writing .*shard.* run the same command again$"),
        (errno.EACCES, "cannot be written"),
    ],
)
def test_failed_writes_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=message):
        write_atomically(tmp_path / "shard-00000.hdf5", b"content")
    assert not list(tmp_path.iterdir())


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: Not a directory; check buffer_path"):
        open_folder(tmp_path / "file" / "sequence", config_of())
