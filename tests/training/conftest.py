"""One small dataset for all tests of training."""

from __future__ import annotations

import pytest

from invdyn.transitions.store import TransitionStore
from tests.training.runs import make_dataset


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> TransitionStore:
    return make_dataset(tmp_path_factory.mktemp("tiny"))
