"""What a worker does not see as its driver does is said, with the node; what was written to find out is gone."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from invdyn import nodes, storage
from invdyn.errors import ConfigError, StorageError
from invdyn.nodes import MARK_FILE, SharedFiles, fingerprint, shared_files


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    (tmp_path / "manifest.json").write_text('{"rows": 3}')
    return str(tmp_path / "manifest.json")


def test_the_mark_lasts_as_long_as_the_job(tmp_path: Path, dataset: str, ray_session: None) -> None:
    folder = tmp_path / "runs/new"
    with shared_files(str(folder), [dataset, str(tmp_path / "none")], {"CPU": 1}) as files:
        assert (folder / MARK_FILE).read_text() == files.token
        assert files.reads == {dataset: fingerprint(dataset)}
        files.check_here()
    assert not folder.exists()
    folder.mkdir()
    with shared_files(str(folder), [dataset], {"CPU": 1}):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def seen(tmp_path: Path, dataset: str) -> SharedFiles:
    """What a driver hands to workers."""
    (tmp_path / MARK_FILE).write_text("token")
    found = fingerprint(dataset)
    assert found is not None
    return SharedFiles(str(tmp_path), "token", {dataset: found}, {})


def test_what_a_node_does_not_see(tmp_path: Path, dataset: str) -> None:
    files = seen(tmp_path, dataset)
    assert nodes._answer(files, "a") is None
    assert (tmp_path / ".reached_by_a.tmp").read_text() == "token"
    Path(dataset).write_text('{"rows": 4}')
    assert nodes._answer(files, "b") == f"{dataset} is another file than the driver's"
    Path(dataset).unlink()
    assert nodes._answer(files, "b") == f"{dataset} is not there"
    other = replace(files, token="of another job")
    assert nodes._answer(other, "b") == f"{tmp_path} is not the driver's folder"
    assert not (tmp_path / ".reached_by_b.tmp").exists()
    expected = rf"on node {socket.gethostname()}: {dataset} is not there; use a folder that all nodes share, or an s3"
    with pytest.raises(StorageError, match=expected):
        files.check_here()


def test_a_service_that_a_node_does_not_reach(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3_bucket}/{tmp_path.name}/{MARK_FILE}", b"token")
    files = SharedFiles(f"{s3_bucket}/{tmp_path.name}", "token", {}, storage.environment())
    assert files.problem() is None
    monkeypatch.setattr(storage, "FIRST_CONTACT_S", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # of the node itself: nothing listens here
    assert "storage does not answer" in str(files.problem())


def test_a_folder_that_the_driver_cannot_write(tmp_path: Path, dataset: str, ray_session: None) -> None:
    with (
        pytest.raises(ConfigError, match=r"cannot write to .*manifest.json/run: Not a directory"),
        shared_files(f"{dataset}/run", [], {"CPU": 1}),
    ):
        pass


def test_credentials_are_not_shown(tmp_path: Path, dataset: str) -> None:
    files = replace(seen(tmp_path, dataset), environment={"AWS_SECRET_ACCESS_KEY": "hidden"})
    assert "hidden" not in repr(files)
