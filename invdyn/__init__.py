"""Train inverse dynamics models: which action took state s to s'?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from invdyn.errors import InvdynError

if TYPE_CHECKING:
    from invdyn.models.flow import FlowInverseDynamics
    from invdyn.training.checkpoint import load_model
    from invdyn.transitions.extract import read_transitions
    from invdyn.transitions.store import TransitionStore

__version__ = "0.1.0"
__all__ = ["FlowInverseDynamics", "InvdynError", "TransitionStore", "load_model", "read_transitions"]

# Imported on first use: torch and ray cost seconds, and a reader of a dataset needs neither.
_HOMES = {
    "FlowInverseDynamics": "invdyn.models.flow",
    "load_model": "invdyn.training.checkpoint",
    "TransitionStore": "invdyn.transitions.store",
    "read_transitions": "invdyn.transitions.extract",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'invdyn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
