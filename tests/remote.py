"""What the tests of URLs share: files there and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from invdyn import storage


def upload(path: Path, url: str) -> str:
    """Copy a file or a folder to a URL, and return it."""
    filesystem, name = storage.connect(url)
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            target = name if path.is_file() else f"{name}/{file.relative_to(path).as_posix()}"
            filesystem.pipe_file(target, file.read_bytes())
    return url


def contents(url: str) -> dict[str, bytes]:
    """The bytes of every file below a URL."""
    filesystem, name = storage.connect(url)
    return {path: filesystem.cat_file(f"{name}/{path}") for path in storage.list_names(url, recursive=True)}


@contextmanager
def silence(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a service time out whenever a whole file is read."""

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise TimeoutError("no answer within 30 s")

    with monkeypatch.context() as patch:
        patch.setattr(storage.connect(url)[0], "cat_file", fail)
        yield
