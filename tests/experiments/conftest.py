"""The commands, run in the tests' own process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RunHere = Callable[..., int]


@pytest.fixture
def command(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_cwd: Path) -> Iterator[Callable[..., RunHere]]:
    """Return what runs a command, by name, in this process and an empty folder, and returns its exit code.

    Names as general as `export` are forgotten after the test.
    """
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    loaded: list[str] = []

    def load(name: str, *flags: str) -> RunHere:
        script, common = importlib.import_module(name), importlib.import_module("common")
        loaded.append(name)

        def run(*arguments: object) -> int:
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, *map(str, arguments)])
            try:
                common.run_command(script.main)
            except SystemExit as stopped:
                return int(stopped.code or 0)
            return 0

        return run

    yield load
    for name in loaded:
        sys.modules.pop(name, None)
