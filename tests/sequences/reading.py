"""What the tests of the readers share: a whole recording as transitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from invdyn.sequences.base import EpisodeArrays, SequencePlan, SequenceReader, check_finite
from invdyn.sequences.registry import open_sequences
from invdyn.transitions.windows import Transitions, Window, make_transitions


def read_all(reader: SequenceReader, plan: SequencePlan) -> EpisodeArrays:
    """Read a whole plan file by file, checking finite values as the extraction does."""
    arrays = []
    for part in plan.by_file():
        arrays.append(reader.read(part))
        check_finite(arrays[-1], part)
    return EpisodeArrays(np.concatenate([a.state for a in arrays]), np.concatenate([a.action for a in arrays]))


def cut(plan: SequencePlan, arrays: EpisodeArrays, window: Window | None = None) -> Transitions:
    """Cut all transitions of a recording."""
    window = window or Window()
    limit = window.num_rows(plan.num_states, plan.num_actions)
    return make_transitions(arrays, window, plan.num_states, plan.num_actions, limit, 0)


def transitions_of(path: Path, window: Window | None = None, **arguments: Any) -> tuple[SequencePlan, Transitions]:
    """Open, inspect, read and cut a recording."""
    reader = open_sequences(str(path), **arguments)
    plan = reader.inspect()
    return plan, cut(plan, read_all(reader, plan), window)
