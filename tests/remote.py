"""What the tests of URLs share: files there and back."""

from __future__ import annotations

from pathlib import Path

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
