"""What the recording's own simulator knows: the exact action of a transition, and where an action really leads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Num

from invdyn.errors import InvdynError
from invdyn.transitions.store import TransitionStore

if TYPE_CHECKING:
    from invdyn.envs.inverse import PhysicalInverse
    from invdyn.envs.posterior import ActionPosterior
    from invdyn.envs.replay import SimulatorReplay

ENV_ID = "env_id"
ENV_KWARGS = "env_kwargs"

Windows = Num[np.ndarray, "rows window_dim"]
States = Num[np.ndarray, "rows state_dim"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class RecordedSimulator:
    """The simulator of a recording, as far as there is one.

    Attributes:
        env_id: its Gymnasium id, or None when the recording names none.
        replay: maps states (rows, state_dim) and actions (rows, action_dim) to next states, or None.
        replay_reason: why `replay` is None.
        inverse: the exact physical inverse, or None.
        inverse_reason: why `inverse` is None.
        posterior: the exact p(action | state, next_state) of a task with many right actions, or None.
        posterior_reason: why `posterior` is None.
    """

    env_id: str | None
    replay: SimulatorReplay | None
    replay_reason: str | None
    inverse: PhysicalInverse | None
    inverse_reason: str | None
    posterior: ActionPosterior | None
    posterior_reason: str | None


def recorded_simulator(store: TransitionStore) -> RecordedSimulator:
    """Make the simulator that a dataset was recorded in, or say why there is none."""
    recording: dict[str, Any] = store.manifest["recording"]
    env_id = recording.get(ENV_ID)
    if not env_id:
        reason = "the recording does not name the simulator it was made in"
        return RecordedSimulator(None, None, reason, None, reason, None, reason)
    constant = store.constant_dims
    if constant is not None and (constant.state or constant.action):
        reason = "the rows leave out constant dimensions that the simulator needs"
        return RecordedSimulator(str(env_id), None, reason, None, reason, None, reason)
    from invdyn.envs.inverse import PhysicalInverse  # MuJoCo: imported only where it is needed
    from invdyn.envs.posterior import ActionPosterior
    from invdyn.envs.replay import SimulatorReplay

    env_kwargs = json.loads(recording.get(ENV_KWARGS) or "{}")
    replay, replay_reason = _make(SimulatorReplay, env_id, env_kwargs)
    inverse, inverse_reason = _make(PhysicalInverse, env_id, env_kwargs)
    posterior, posterior_reason = _make(ActionPosterior, env_id, env_kwargs)
    if store.gap > 1 or store.horizon > 1:
        reason = f"the exact posterior is of one step, the dataset's gap is {store.gap}, its horizon {store.horizon}"
        posterior, posterior_reason = None, reason
    if store.gap > 1:
        inverse, inverse_reason = None, f"the exact inverse is of one step, the dataset's gap is {store.gap}"
    if store.gap > store.horizon:
        reason = f"the next state lies {store.gap} steps ahead, a row holds {store.horizon} action(s)"
        replay, replay_reason = None, reason
    return RecordedSimulator(str(env_id), replay, replay_reason, inverse, inverse_reason, posterior, posterior_reason)


@dataclass(frozen=True)
class ExactActions:
    """The exact actions of some transitions.

    Attributes:
        action: (rows, action_dim) float64.
        trusted: (rows,) False where an active contact or joint limit amplifies rounding, or the control range hides
            the action: there the inverse is not a function.
    """

    action: Float[np.ndarray, "rows action_dim"]
    trusted: Bool[np.ndarray, " rows"]


def exact_actions(
    simulator: RecordedSimulator, state: Windows, next_state: States
) -> tuple[ExactActions | None, str | None]:
    """Return the exact action of each transition, or None and why there is none.

    Args:
        simulator: from `recorded_simulator`.
        state: (rows, (history + 1) * state_dim), current state last.
        next_state: (rows, state_dim).
    """
    if simulator.inverse is None:
        return None, simulator.inverse_reason
    try:
        solution = simulator.inverse.solve(current_state(state, next_state), next_state.astype(np.float64))
    except InvdynError as error:
        return None, str(error)
    trusted = ~(solution.constrained | solution.saturated)
    if not trusted.any():
        return None, "every row has an active contact, a joint limit or a clipped action, where no inverse is exact"
    return ExactActions(solution.action, trusted), None


def reached_states(
    simulator: RecordedSimulator,
    state: Windows,
    actions: Num[np.ndarray, "rows horizon action_dim"],
    next_state: States,
    gap: int,
) -> tuple[Float[np.ndarray, "rows state_dim"] | None, str | None]:
    """Put the simulator in each state, apply the first `gap` actions, return where it ends, or None and why not.

    The simulator clips actions to its own range, as it would for a controller.
    """
    if simulator.replay is None:
        return None, simulator.replay_reason
    reached = current_state(state, next_state)
    try:
        for step in range(gap):
            reached = simulator.replay(reached, actions[:, step])
    except InvdynError as error:
        return None, str(error)
    return reached, None


def posterior_samples(
    simulator: RecordedSimulator, state: Windows, next_state: States, num_samples: int, seed: int
) -> tuple[Float[np.ndarray, "samples rows action_dim"] | None, str | None]:
    """Draw actions of the exact posterior of each transition, or None and why there is none.

    Args:
        simulator: from `recorded_simulator`.
        state: (rows, (history + 1) * state_dim), current state last.
        next_state: (rows, state_dim).
        num_samples: actions of each transition.
        seed: of the draws.
    """
    if simulator.posterior is None:
        return None, simulator.posterior_reason
    generator = np.random.default_rng(seed)
    try:
        states = current_state(state, next_state)
        return simulator.posterior.sample(states, next_state.astype(np.float64), num_samples, generator), None
    except InvdynError as error:
        return None, str(error)


def current_state(state: Windows, next_state: States) -> Float[np.ndarray, "rows state_dim"]:
    """Return the last state of each window, (rows, state_dim) float64."""
    return state[:, -next_state.shape[1] :].astype(np.float64)


def _make(
    kind: Callable[[str, dict[str, Any]], Made], env_id: str, env_kwargs: dict[str, Any]
) -> tuple[Made | None, str | None]:
    try:
        return kind(env_id, env_kwargs), None
    except InvdynError as error:
        return None, str(error)
