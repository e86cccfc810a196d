"""One small recording for all tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from invdyn.transitions.store import TransitionStore
from tests.evaluation.pendulum import extract, record_pendulum


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded sequences."""
    path = tmp_path_factory.mktemp("pendulum") / "sequence" / "pendulum"
    record_pendulum(path)
    return path


@pytest.fixture(scope="session")
def store(recording: Path) -> TransitionStore:
    """Single transitions of the recording."""
    return extract(recording)
