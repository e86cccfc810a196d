"""The benchmarks are scripts that import their siblings by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a benchmark by its name; names as general as `run` are forgotten after the test."""
    folder = repository / "experiments/benchmarks"
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)
