"""A dataset on a storage service is, to the byte, the one made on this machine, by whatever way it came about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invdyn import storage
from invdyn.errors import ConfigError, DataError, StorageError
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.extract import Listener, create_dataset, read_transitions
from invdyn.transitions.plan import ExtractionPlan
from invdyn.transitions.store import COLUMNS, TransitionStore
from tests import remote as there
from tests.sequences import writers
from tests.sequences.test_every_reader import Case, every_case
from tests.transitions.datasets import config_of, contents, record


@pytest.fixture
def here(tmp_path: Path) -> dict[str, bytes]:
    """The dataset of the recording, made on this machine."""
    record(tmp_path)
    return contents(create_dataset(config_of(tmp_path), local=True).path)


def config_at(tmp_path: Path, url: str, **values: Any) -> DatasetConfig:
    """The same dataset from the same recording, both below a URL."""
    recording = there.upload(tmp_path / "sequence/r", f"{url}/sequence/r")
    return config_of(tmp_path, buffer_path=recording, **values)


def test_same_bytes_as_on_this_machine(tmp_path: Path, here: dict[str, bytes], remote: str) -> None:
    store = create_dataset(config_at(tmp_path, remote), local=True)
    assert store.path == f"{remote}/inverse_dynamics/r"
    assert there.contents(store.path) == here
    local = TransitionStore(tmp_path / "inverse_dynamics/r")
    for split in ("train", "val", "test"):
        rows, expected = store.load(split), local.load(split)
        for column in COLUMNS:
            np.testing.assert_array_equal(rows[column], expected[column])
        part = store.parts(split)[0]
        np.testing.assert_array_equal(store.read_rows(part, 1, 3)["state"], expected["state"][1:3])
    with pytest.raises(DataError, match="dataset exists already: "):
        create_dataset(config_at(tmp_path, remote), local=True)


@every_case
def test_same_bytes_for_every_format(case: Case, tmp_path: Path, remote: str) -> None:
    path = case.write(tmp_path / "here", writers.make_episodes([4, 2, 7, 3, 5, 6, 2]))
    made = []
    for folder in (str(path), there.upload(path, f"{remote}/{path.name}")):
        output = str(tmp_path / "out") if folder == str(path) else f"{remote}/out"
        config = DatasetConfig(name="d", buffer_path=folder, output_path=output)
        made.append(create_dataset(config, local=True).path)
    assert there.contents(made[1]) == contents(made[0])


def interrupt(config: DatasetConfig, segments: int, **options: Any) -> None:
    """Leave a dataset as a run does that is stopped after some segments."""
    calls: Iterator[int] = iter(range(segments + 1))  # the first call tells what was done before

    def stop(_rows: int) -> None:
        if next(calls) == segments:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_dataset(config, local=True, listener=Listener(on_rows=stop), **options)


def test_a_stopped_run_is_continued(tmp_path: Path, here: dict[str, bytes], remote: str) -> None:
    config = config_at(tmp_path, remote)
    interrupt(config, 2)
    found = there.contents(config.transitions_path)
    assert "manifest.json" not in found
    with pytest.raises(DataError, match="dataset is unfinished: "):
        TransitionStore(config.transitions_path)
    done: list[int] = []
    store = create_dataset(config, local=True, listener=Listener(on_rows=done.append))
    assert done[0] > 0  # rows that were there already
    assert there.contents(store.path) == here


def test_another_plan_needs_overwrite(tmp_path: Path, here: dict[str, bytes], remote: str) -> None:
    first = config_at(tmp_path, remote, gap=2)
    interrupt(first, 1)
    config = config_at(tmp_path, remote)
    with pytest.raises(DataError, match="holds an unfinished dataset with another plan"):
        create_dataset(config, local=True)
    store = create_dataset(config, local=True, overwrite=True)
    assert there.contents(store.path) == here
    replaced = create_dataset(first, local=True, overwrite=True)
    assert replaced.gap == 2
    assert sorted(there.contents(replaced.path)) == sorted(here)


def test_a_recording_that_changed_is_another_plan(tmp_path: Path, here: dict[str, bytes], remote: str) -> None:
    config = config_at(tmp_path, remote)
    interrupt(config, 1)
    shard = tmp_path / "sequence/r/shard-00000.hdf5"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # the same size
    shard.write_bytes(content)
    with pytest.raises(DataError, match="another plan"):
        create_dataset(config_at(tmp_path, remote), local=True)


def test_lost_and_cut_parts(tmp_path: Path, here: dict[str, bytes], remote: str) -> None:
    store = create_dataset(config_at(tmp_path, remote), local=True)
    path = storage.join(store.path, store.parts("train")[0].file)
    filesystem, name = storage.connect(path)
    filesystem.pipe_file(name, filesystem.cat_file(name)[:-8])
    with pytest.raises(DataError, match=r"part cannot be read: .*train/part-\d+.h5: .*; rebuild with --overwrite"):
        store.load("train")
    storage.remove([path])
    with pytest.raises(DataError, match=r"part cannot be read: .*file not found: .*; rebuild with --overwrite"):
        store.load("train")


def test_no_dataset(remote: str) -> None:
    with pytest.raises(DataError, match="dataset not found: "):
        TransitionStore(f"{remote}/nothing")
    with pytest.raises(DataError, match="recording not found: "):
        create_dataset(DatasetConfig(name="d", buffer_path=f"{remote}/sequence/nothing"), local=True)


def test_a_missing_bucket_is_told_before_the_work(tmp_path: Path, s3_bucket: str) -> None:
    record(tmp_path)
    config = config_of(tmp_path, output_path="s3://no-such-bucket/d")
    with pytest.raises(
        StorageError, match=r"cannot write s3://no-such-bucket/d/.progress/plan.json: .*create the bucket"
    ):
        create_dataset(config, local=True)


def test_a_service_that_fails_is_no_damage(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `on_error: skip` only what is known to be damaged is left out."""
    record(tmp_path)
    config = config_at(tmp_path, f"{s3_bucket}/{tmp_path.name}", format_options={"on_error": "skip"})
    filesystem, _ = storage.connect(config.buffer_path)

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise PermissionError("the token has expired")

    def expire(_plan: ExtractionPlan) -> None:
        monkeypatch.setattr(filesystem, "cat_ranges", fail)

    with pytest.raises((DataError, StorageError), match=r"not allowed to read s3://.*: the token has expired"):
        create_dataset(config, local=True, listener=Listener(on_plan=expire))
    assert "manifest.json" not in there.contents(config.transitions_path)


def test_a_service_that_is_silent_for_a_while_costs_nothing(
    tmp_path: Path, here: dict[str, bytes], remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(tmp_path, remote)
    interrupt(config, 2)
    found = there.contents(config.transitions_path)
    with there.silence(remote, monkeypatch), pytest.raises(StorageError, match="storage does not answer"):
        create_dataset(config, local=True)
    assert there.contents(config.transitions_path) == found
    store = create_dataset(config, local=True)
    assert there.contents(store.path) == here
    with there.silence(remote, monkeypatch), pytest.raises(StorageError, match="storage does not answer"):
        TransitionStore(store.path)


@pytest.mark.parametrize("name", ["buffer_path", "output_path"])
def test_memory_is_refused_where_workers_would_look_for_it(tmp_path: Path, name: str) -> None:
    record(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{name} must be where workers reach it: memory://sequence/x"):
        create_dataset(config_of(tmp_path, **{name: "memory://sequence/x"}))


def test_workers_read_and_write_s3(tmp_path: Path, here: dict[str, bytes], s3_bucket: str, ray_session: None) -> None:
    """Ray's workers started without the credentials, as on a cluster: they get them from this process."""
    store = create_dataset(config_at(tmp_path, f"{s3_bucket}/{tmp_path.name}"), num_workers=2)
    assert there.contents(store.path) == here
    rows, expected = read_transitions(store.path, "val").take_all(), store.load("val")
    np.testing.assert_array_equal(np.stack([row["state"] for row in rows]), expected["state"])


def test_paths_are_derived_from_urls(tmp_path: Path) -> None:
    def derived(url: str) -> str:
        return config_of(tmp_path, buffer_path=url).transitions_path

    assert derived("s3://bucket/data/sequence/pendulum/") == "s3://bucket/data/inverse_dynamics/pendulum"
    with pytest.raises(ConfigError, match="must contain '/sequence/'"):
        derived("s3://bucket/pendulum")


def test_a_linked_recording_has_its_transitions_beside_the_link(tmp_path: Path) -> None:
    recording = record(tmp_path / "theirs")
    link = tmp_path / "ours" / "sequence" / "pen"
    link.parent.mkdir(parents=True)
    link.symlink_to(recording)
    config = config_of(tmp_path, buffer_path=str(link))
    assert config.transitions_path == create_dataset(config, local=True).path == f"{tmp_path}/ours/inverse_dynamics/pen"
    assert not (tmp_path / "theirs" / "inverse_dynamics").exists()


def test_what_is_relative_lies_below_the_storage(tmp_path: Path) -> None:
    config = config_of(tmp_path, storage="s3://bucket/lab/", buffer_path="data/sequence/p")
    assert config.sequence_path == "s3://bucket/lab/data/sequence/p"
    assert config.transitions_path == "s3://bucket/lab/data/inverse_dynamics/p"
    assert config.below_storage("runs/x") == "s3://bucket/lab/runs/x"
    assert config.replace(output_path="out").transitions_path == "s3://bucket/lab/out"
    assert config.replace(buffer_path="/data/sequence/p").transitions_path == "/data/inverse_dynamics/p"
    assert config.replace(buffer_path="gs://b/sequence/p").sequence_path == "gs://b/sequence/p"
    assert config.replace(storage=str(tmp_path)).below_storage("runs/x") == f"{tmp_path}/runs/x"


def test_where_a_dataset_lies_changes_nothing_in_it(tmp_path: Path, here: dict[str, bytes]) -> None:
    config = config_of(tmp_path, storage=str(tmp_path / "elsewhere"), buffer_path=str(tmp_path / "sequence/r"))
    store = create_dataset(config.replace(output_path="out"), local=True)
    assert store.path == f"{tmp_path}/elsewhere/out"
    assert contents(store.path) == here
