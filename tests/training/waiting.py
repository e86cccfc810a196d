"""Waiting for what another thread or process does to a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 120


def wait_for(condition: Callable[[], Any]) -> Any:
    """Return what a condition gives as soon as it gives anything.

    Raises:
        AssertionError: when it takes too long.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found
