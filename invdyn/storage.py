"""Files by path or URL: folders of this machine, and whatever fsspec reaches (s3://, gs://, memory://).

A path goes to the operating system as it is, a URL to fsspec; the rest of the project does not tell them apart.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.registry import known_implementations

from invdyn.errors import ConfigError, DataError, InvdynError, StorageError

URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
LOCAL_PROTOCOLS = ("file://", "local://")
ONE_PROCESS_PROTOCOLS = ("memory://",)
TEMPORARY_SUFFIX = ".tmp"
FIRST_CONTACT_S = 10.0
"""How long a process waits for the first answer of a storage service; later requests are tried for minutes."""

# Lists are never remembered: other processes write the same folders.
COMMON_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 4,
        "read_timeout": 30,
        "retries": {"mode": "standard", "max_attempts": 4},
        # Connections that large reads share out their ranges over.
        "max_pool_connections": 32,
    }
}
OPTIONS: dict[str, dict[str, Any]] = {"s3": S3_OPTIONS, "s3a": S3_OPTIONS}

# What an endpoint and its credentials are given by; workers on other machines get them from the driver.
ENVIRONMENT = re.compile(
    r"AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN|REGION|DEFAULT_REGION|ENDPOINT_URL|ENDPOINT_URL_S3)"
    r"|STORAGE_EMULATOR_HOST|FSSPEC_.+"
)

# By name: their packages are optional.
CREDENTIAL_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "TokenRetrievalError"}
CONNECTION_ERRORS = {"ConnectionError", "HTTPClientError", "ClientConnectionError", "TimeoutError", "FSTimeoutError"}


@dataclass(frozen=True)
class FileStatus:
    """Size of a file, and a number that is another one when it is written again.

    Attributes:
        size: bytes.
        version: modification time in ns; of an object, a number made of its ETag where it has one.
    """

    size: int
    version: int


def is_url(path: str) -> bool:
    """Return whether fsspec is to be asked for a path.

    Example:
        >>> is_url("s3://bucket/data"), is_url("/data"), is_url("file:///data")
        (True, False, False)
    """
    return URL.match(path) is not None and not path.startswith(LOCAL_PROTOCOLS)


def absolute(path: str) -> str:
    """Return a path that means the same in any working folder, links as they are; a URL without its last slash."""
    if is_url(path):
        return path.rstrip("/") if not path.endswith("://") else path
    for protocol in LOCAL_PROTOCOLS:
        path = path.removeprefix(protocol)
    # As it is written, for a link says where a recording belongs; only what `..` leaves is looked up.
    parts = Path(path).expanduser().absolute().parts
    after = max((index for index, part in enumerate(parts) if part == ".."), default=-1) + 1
    return str(Path(*parts[:after]).resolve().joinpath(*parts[after:]))


def join(folder: str, *names: str) -> str:
    """Return the path of something inside a folder.

    Example:
        >>> join("s3://bucket/data/", "train", "part.h5"), join("/data", "part.h5")
        ('s3://bucket/data/train/part.h5', '/data/part.h5')
    """
    return "/".join([folder.rstrip("/"), *names]) if is_url(folder) else str(Path(folder, *names))


def parent(path: str) -> str:
    """Return the folder that something is in."""
    return path.rstrip("/").rpartition("/")[0] if is_url(path) else str(Path(path).parent)


def base_name(path: str) -> str:
    """Return the last part of a path."""
    return path.rstrip("/").rpartition("/")[2] if is_url(path) else Path(path).name


def relative(path: str, folder: str) -> str:
    """Return a path relative to a folder above it, with forward slashes."""
    if is_url(path):
        return path.removeprefix(folder.rstrip("/")).strip("/")
    return Path(path).relative_to(folder).as_posix()


def is_inside(path: str, folder: str) -> bool:
    """Return whether a path is below a folder, as it is written."""
    if is_url(path):
        return path.startswith(folder.rstrip("/") + "/")
    return Path(path) != Path(folder) and Path(path).is_relative_to(folder)


def exists(path: str) -> bool:
    """Return whether a file or a folder is at `path`."""
    if not is_url(path):
        return Path(path).exists()
    with explained(path):
        filesystem, name = connect(path)
        return bool(filesystem.exists(name))


def is_file(path: str) -> bool:
    """Return whether a file is at `path`."""
    if not is_url(path):
        return Path(path).is_file()
    with explained(path):
        filesystem, name = connect(path)
        return bool(filesystem.isfile(name))


def is_folder(path: str) -> bool:
    """Return whether a folder is at `path`."""
    if not is_url(path):
        return Path(path).is_dir()
    with explained(path):
        filesystem, name = connect(path)
        return bool(filesystem.isdir(name))


def list_names(folder: str, *, recursive: bool = False) -> list[str]:
    """Return the names in a folder, or of all files below it, relative to it, in no order; none where is no folder.

    Links to folders are followed, but none to a folder whose content is listed already.
    """
    if not is_url(folder):
        return list(_names_below(folder)) if recursive else [path.name for path in Path(folder).glob("*")]
    with explained(folder):
        filesystem, root_name = connect(folder)
        try:
            found = filesystem.find(root_name) if recursive else filesystem.ls(root_name, detail=False)
        except FileNotFoundError:
            return []
    start = root_name.rstrip("/") + "/"
    names = (str(path).rstrip("/") for path in found)
    return [name.removeprefix(start) for name in names if name.startswith(start)]


def _names_below(folder: str) -> Iterator[str]:
    """Yield the names of all files below a folder; a folder that can be reached by several paths is entered once."""
    root = Path(folder)
    entered: set[Path] = set()
    waiting = [root]
    while waiting:
        # Links wait until all that is below by its own path has been entered.
        for here, folders, files in os.walk(heapq.heappop(waiting)):
            if (real := Path(here).resolve()) in entered:
                folders.clear()
                continue
            entered.add(real)
            yield from (Path(here, name).relative_to(root).as_posix() for name in files)
            for path in (Path(here, name) for name in folders):
                if path.is_symlink():
                    heapq.heappush(waiting, path)


def status(path: str) -> FileStatus:
    """Return size and version of a file.

    Raises:
        FileNotFoundError: when there is none.
    """
    if not is_url(path):
        found = Path(path).stat()
        return FileStatus(found.st_size, found.st_mtime_ns)
    with explained(path):
        filesystem, name = connect(path)
        info = filesystem.info(name)
    return FileStatus(int(info["size"] or 0), _version(info))


def read_text(path: str) -> str:
    """Return the content of a small text file.

    Raises:
        FileNotFoundError: when there is none.
    """
    return read_bytes(path).decode("utf-8")


def read_bytes(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        FileNotFoundError: when there is none.
    """
    if not is_url(path):
        return Path(path).read_bytes()
    with explained(path):
        filesystem, name = connect(path)
        return bytes(filesystem.cat_file(name))


def read_head(path: str, num_bytes: int) -> bytes:
    """Return the first bytes of a file.

    Raises:
        FileNotFoundError: when there is none.
    """
    if not is_url(path):
        with Path(path).open("rb") as file:
            return file.read(num_bytes)
    with explained(path):
        filesystem, name = connect(path)
        size = int(filesystem.info(name)["size"] or 0)
        return bytes(filesystem.cat_file(name, start=0, end=min(num_bytes, size))) if size else b""


def write_bytes(url: str, content: bytes) -> None:
    """Make an object of a storage service; what was there is replaced at once.

    Raises:
        StorageError: when the service does not take it.
    """
    with _writing_object(url) as (filesystem, name):
        filesystem.pipe_file(name, content)


def upload(source: Path, url: str) -> None:
    """Copy a file of this machine to a storage service, where it appears when all of it has arrived.

    Raises:
        StorageError: when the service does not take it.
    """
    with _writing_object(url) as (filesystem, name):
        filesystem.put_file(str(source), name)


def remove(paths: Iterable[str]) -> None:
    """Remove files; those that are not there are no error.

    Raises:
        OSError: when a file on this machine cannot be removed.
        StorageError: when one elsewhere cannot.
    """
    for path in paths:
        if not is_url(path):
            Path(path).unlink(missing_ok=True)
            continue
        with explained(path), suppress(FileNotFoundError):
            filesystem, name = connect(path)
            filesystem.rm_file(name)


def remove_empty_folder(path: str) -> None:
    """Remove a folder that holds nothing; a storage service has none such."""
    if not is_url(path) and Path(path).is_dir():
        Path(path).rmdir()


def move(source: str, target: str) -> None:
    """Move a file within one disk or one storage service; what is at `target` is replaced."""
    if not is_url(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        return
    with explained(target):
        filesystem, name = connect(source)
        filesystem.copy(name, connect(target)[1])
        filesystem.rm_file(name)


@contextmanager
def replacing(path: str) -> Iterator[Path]:
    """Give a local temporary file to write; at the end it becomes `path`, whole or, on any failure, not at all.

    On this machine it lies beside `path` and is renamed, see `renaming`; for a URL it is uploaded: an object appears
    when all of it has arrived.

    Raises:
        DataError: when the disk is full or `path` cannot be written; what was there before is left as it was.
        StorageError: when the storage service does not take it; likewise.
    """
    with writing_to(path):
        if is_url(path):
            with tempfile.TemporaryDirectory(prefix="invdyn-") as folder:
                temporary = Path(folder, base_name(path))
                yield temporary
                upload(temporary, path)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with renaming(Path(path)) as temporary:
                yield temporary


@contextmanager
def renaming(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write; at the end it is flushed to the disk and becomes `path`.

    Raises:
        OSError: when it cannot be written; what was there before is left as it was, and no file beside it.
    """
    # Two nodes that write the same file may do so in processes of the same number.
    name = f".{path.name.removeprefix('.')}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    temporary = path.with_name(name)
    try:
        yield temporary
        flush(temporary)  # else a power cut could leave the name and lose the content
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def flush(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing_to(path: str) -> Iterator[None]:
    """Turn an OSError into the error for a file that cannot be written.

    Raises:
        DataError: naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot write {path}{gathering_place(path)}: {reason}; free some space or set output_path, then run again"
        ) from None


def gathering_place(path: str) -> str:
    """Return in words where a file for a storage service is gathered first: that disk may be the full one."""
    return f" (gathered on {socket.gethostname()} in {tempfile.gettempdir()} first)" if is_url(path) else ""


def check_shared(name: str, path: str) -> None:
    """Check that other processes can reach a path.

    Raises:
        ConfigError: when it is in the memory of this one.
    """
    if path.startswith(ONE_PROCESS_PROTOCOLS):
        raise ConfigError(
            f"{name} must be where workers reach it: {path} is in the memory of one process; give --local, or a folder "
            "or an s3:// or gs:// URL"
        )


def check_local(name: str, path: str) -> None:
    """Check that a path is on a mounted disk.

    Raises:
        ConfigError: when it is a URL.
    """
    if is_url(path):
        raise ConfigError(f"{name} must be a folder on a mounted disk, got {path!r}")


def environment() -> dict[str, str]:
    """Return the variables that give endpoints and credentials, for `set_environment` in a worker."""
    return {name: value for name, value in sorted(os.environ.items()) if ENVIRONMENT.fullmatch(name)}


def set_environment(variables: Mapping[str, str]) -> None:
    """Take over the endpoints and credentials of the driver."""
    os.environ.update(variables)


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the file's name in it.

    Raises:
        ConfigError: when there is no such protocol, or its package is not installed.
        StorageError: when the service does not answer.
    """
    protocol = url.partition("://")[0].lower()
    # A process that is forked, or given other credentials, needs connections of its own.
    filesystem = _connection(protocol, os.getpid(), *environment().items())
    name = filesystem._strip_protocol(url)
    if isinstance(filesystem, AsyncFileSystem) and not getattr(filesystem, "_invdyn_answered", False):
        with explained(url), suppress(FileNotFoundError):
            sync(filesystem.loop, filesystem._info, name, timeout=FIRST_CONTACT_S)
        filesystem._invdyn_answered = True
    return filesystem, str(name)


@contextmanager
def explained(url: str, doing: str = "read") -> Iterator[None]:
    """Turn what a storage service's package raises into an error that says what to do; a missing file stays as it is.

    Raises:
        FileNotFoundError: as it comes.
        StorageError: for all other failures.
    """
    try:
        yield
    except (InvdynError, FileNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001 - each service has its own, below no common type
        raise _explanation(url, doing, error) from None


def _explanation(url: str, doing: str, error: Exception) -> StorageError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    reason = " ".join(str(error).split()) or type(error).__name__
    if kinds & CREDENTIAL_ERRORS:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what your service needs (docs/storage.md)"
        return StorageError(f"no credentials to {doing} {url}: {reason}; {advice}")
    if isinstance(error, PermissionError):
        return StorageError(f"not allowed to {doing} {url}: {reason}; give credentials that are (docs/storage.md)")
    if kinds & CONNECTION_ERRORS:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "not set"
        return StorageError(
            f"storage does not answer: {url}: {reason}; check the network and the endpoint (AWS_ENDPOINT_URL is "
            f"{endpoint})"
        )
    return StorageError(f"cannot {doing} {url}: {type(error).__name__}: {reason}")


def common_version(versions: Sequence[int]) -> int:
    """Return a number that is another one when any of several files is written again: versions have no order."""
    return versions[0] if len(versions) == 1 else _hash(repr(tuple(versions)))


@contextmanager
def _writing_object(url: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    try:
        with explained(url, "write"):
            yield connect(url)
    except FileNotFoundError as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"cannot write {url}: {reason}; create the bucket, or give another path") from None


@functools.lru_cache(maxsize=16)
def _connection(protocol: str, *_identity: object) -> fsspec.AbstractFileSystem:
    try:
        implementation = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = str(known_implementations[protocol]["class"]).partition(".")[0]
        raise ConfigError(
            f"{protocol}:// needs a package that is not installed: {error}; install it with: pip install {package}"
        ) from None
    except ValueError:
        raise ConfigError(f"unknown protocol {protocol}://; give a path, or a URL such as s3://bucket/folder") from None
    # What FSSPEC_<PROTOCOL>_* variables say is taken over by fsspec where nothing is given here.
    stated = fsspec.config.conf.get(protocol, {})
    options = {k: v for k, v in (COMMON_OPTIONS | OPTIONS.get(protocol, {})).items() if k not in stated}
    filesystem = implementation(skip_instance_cache=True, **options)
    if protocol in OPTIONS:
        filesystem.retries = 2  # on top of those of botocore: for answers that break off
    return filesystem


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _version(info: Mapping[str, Any]) -> int:
    tag = next((str(info[key]) for key in ("ETag", "etag", "md5Hash", "content_md5") if info.get(key)), None)
    if tag is not None:
        return _hash(tag)
    times = (info.get(key) for key in ("LastModified", "last_modified", "mtime", "modified", "updated", "created"))
    for time in times:
        if isinstance(time, datetime):
            return int(time.timestamp() * 1e9)
        if isinstance(time, int | float):
            return int(time * 1e9)
    return 0
