"""Paths and URLs behave alike, a file is there whole or not at all, and each failure says what to do."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from invdyn import storage
from invdyn.errors import ConfigError, DataError, StorageError


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder: on this machine, in the memory of this process, or on the S3 server."""
    if request.param == "local":
        return str(tmp_path / "data")
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    return f"memory://{tmp_path.name}"


def write(path: str, text: str) -> str:
    with storage.replacing(path) as temporary:
        temporary.write_text(text)
    return path


def test_paths_and_urls_behave_alike(folder: str) -> None:
    one, two = storage.join(folder, "a", "one.txt"), storage.join(folder, "two.txt")
    assert not storage.exists(folder)
    assert storage.list_names(folder) == []
    write(one, "1")
    write(two, "zwölf")
    assert [storage.read_text(path) for path in (one, two)] == ["1", "zwölf"]
    assert [storage.status(path).size for path in (one, two)] == [1, 6]
    assert sorted(storage.list_names(folder)) == ["a", "two.txt"]
    assert sorted(storage.list_names(folder, recursive=True)) == ["a/one.txt", "two.txt"]
    for path, is_file, is_folder in ((two, True, False), (storage.join(folder, "a"), False, True)):
        assert (storage.exists(path), storage.is_file(path), storage.is_folder(path)) == (True, is_file, is_folder)
    assert storage.relative(one, folder) == "a/one.txt"
    assert storage.is_inside(one, folder)
    assert not storage.is_inside(folder, folder)
    assert storage.parent(two) == folder
    assert storage.base_name(one) == "one.txt"
    storage.move(two, one)
    assert storage.read_text(one) == "zwölf"
    assert not storage.exists(two)
    storage.remove([one, two])
    assert not storage.exists(one)
    with pytest.raises(FileNotFoundError):
        storage.read_text(one)


def test_links_to_folders_are_followed_and_each_folder_is_listed_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in (root / "own/1.txt", elsewhere / "2.txt"):
        path.parent.mkdir(parents=True)
        path.touch()
    for link, target in (
        (root / "linked", elsewhere),
        (root / "linked_again", elsewhere),
        (root / "latest", root / "own"),
        (root / "own/loop", root),
        (elsewhere / "loop", elsewhere),
        (elsewhere / "back", root),
    ):
        link.symlink_to(target)
    for folder in (str(root), f"{root}/"):
        names = storage.list_names(folder, recursive=True)
        assert sorted(names) == ["linked/2.txt", "own/1.txt"]


def test_version_changes_with_the_content(folder: str) -> None:
    path = storage.join(folder, "x")
    versions = {storage.status(write(path, text)).version for text in ("a", "b", "c")}
    assert len(versions) == 3
    assert 0 not in versions


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(folder: str, error: BaseException) -> None:
    path = write(storage.join(folder, "x"), "old")
    before = storage.list_names(folder)
    expected = DataError if isinstance(error, OSError) else KeyboardInterrupt
    where = rf" \(gathered on {socket.gethostname()} in \S+ first\)" if storage.is_url(folder) else ""
    message = rf"cannot write .*x{where}: .*No space left.*; free some space|^$"
    with pytest.raises(expected, match=message), storage.replacing(path) as temporary:
        temporary.write_text("new")
        raise error
    assert storage.read_text(path) == "old"
    assert storage.list_names(folder) == before
    assert not temporary.exists()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    flushed: list[tuple[int, int]] = []
    flush = os.fsync

    def note(descriptor: int) -> None:
        assert not path.exists()
        flush(descriptor)
        flushed.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", note)
    write(str(path), "content")
    assert flushed == [(path.stat().st_ino, 7)]


def test_large_files_are_uploaded_in_parts_and_appear_whole(s3_bucket: str, tmp_path: Path) -> None:
    filesystem, name = storage.connect(f"{s3_bucket}/{tmp_path.name}")
    content = bytes(range(256)) * 50_000
    path = tmp_path / "x"
    path.write_bytes(content)
    filesystem.put_file(str(path), name, chunksize=5 * 2**20)  # what a file above 100 MB is uploaded by
    assert filesystem.cat_file(name) == content


def test_local_urls_are_paths() -> None:
    assert storage.absolute("file:///data/x") == storage.absolute("local:///data/x") == "/data/x"
    assert storage.absolute("s3://bucket/data/") == "s3://bucket/data"


def test_an_absolute_path_keeps_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, work = tmp_path / "disk/sets/pen", tmp_path / "work"
    real.mkdir(parents=True)
    work.mkdir()
    (tmp_path / "pen").symlink_to(real)
    monkeypatch.chdir(work)
    assert storage.absolute(str(tmp_path / "pen")) == storage.absolute("../pen") == str(tmp_path / "pen")
    assert storage.absolute("./x//y/") == str(work / "x/y")
    assert storage.absolute("../pen/..") == str(real.parent)  # what `cd` would find


# What goes wrong.


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"gs:// needs a package that is not installed: .*; .*pip install gcsfs"):
        storage.exists("gs://bucket/x")


def test_unknown_protocol() -> None:
    with pytest.raises(ConfigError, match=r"unknown protocol s4://; give a path, or a URL such as s3://"):
        storage.exists("s4://bucket/x")


def test_missing_buckets_and_keys(s3_bucket: str) -> None:
    for url in ("s3://no-such-bucket/x", f"{s3_bucket}/nothing/here"):
        assert not storage.exists(url)
        assert storage.list_names(url) == []
        with pytest.raises(FileNotFoundError):
            storage.status(url)


def test_writing_to_a_missing_bucket(s3_bucket: str) -> None:
    with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket/x: .*does not exist; create the bucket"):
        write("s3://no-such-bucket/x", "1")


def test_no_credentials(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(
        StorageError, match=r"no credentials to read .*; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ):
        storage.exists(f"{s3_bucket}/x")


@pytest.fixture
def strict_server(s3_bucket: str) -> Iterator[str]:
    """The bucket while the server checks credentials: the test's are not known to it."""

    def check_after(count: str) -> None:
        url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, count.encode(), {"Content-Type": "text/plain"})).close()

    check_after("0")
    yield s3_bucket
    check_after("inf")


def test_no_permission(strict_server: str) -> None:
    for use in (storage.exists, storage.is_folder, storage.list_names, storage.status):
        with pytest.raises(StorageError, match=r"not allowed to read s3://.*/x: .*; give credentials that are"):
            use(f"{strict_server}/x")
    with pytest.raises(StorageError, match=r"not allowed to write s3://.*/x: .*; give credentials that are"):
        write(f"{strict_server}/x", "1")


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_unreachable_endpoints(s3_bucket: str, silent_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_CONTACT_S", 1.0)
    for endpoint in ("http://127.0.0.1:9", silent_endpoint):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match=rf"storage does not answer: .*AWS_ENDPOINT_URL is {endpoint}"):
            storage.exists(f"{s3_bucket}/x")


def test_memory_is_not_for_workers() -> None:
    with pytest.raises(ConfigError, match=r"output_path must be where workers reach it: memory://x .*give --local"):
        storage.check_shared("output_path", "memory://x")
    storage.check_shared("output_path", "s3://bucket/x")


def test_environment_holds_what_workers_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/of/this/machine")
    found = storage.environment()
    assert found["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert found["AWS_ENDPOINT_URL"] == "http://storage"
    assert "AWS_CONFIG_FILE" not in found
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    storage.set_environment(found)
    assert storage.environment() == found
