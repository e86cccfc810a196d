"""The real recordings that lie beside the project, where they do."""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


def real_recording(name: str) -> Path:
    """Return the path of a real recording, or skip the test where it is not there."""
    path = FIXTURES / name
    if not path.exists():
        pytest.skip(f"real recordings are not on this machine: no {path}")
    return path
