"""Actuations that give several actions the same force, with all actions of a force and their exact distribution.

Each makes the motor's force from an action of one or two numbers. With independent uniform actions, the actions that
could have given a force are the uniform distribution restricted to a curve (or an interval): `sample_first` draws along
it, and the first number with the force determines the rest. Forces are in units of the motor's command, in [-3, 3]; the
cart feels 100 N times it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Float, Float64
from typing_extensions import override

MAX_FORCE = 3.0
FORCE_TOLERANCE = 2e-5
"""Forces closer than this count as the same: float32 states move a force by up to 2e-6, in units of the command."""

Forces = Float64[np.ndarray, " rows"]
Firsts = Float64[np.ndarray, "*samples rows"]


class Actuation(ABC):
    """A map from actions to the motor's force, and the distribution of a uniform action given its force.

    Attributes:
        low: lowest action (action_dim,).
        high: highest action (action_dim,).
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @abstractmethod
    def force(self, action: Float[np.ndarray, "*batch action_dim"]) -> Float64[np.ndarray, "*batch"]:
        """Return the motor's force, in [-3, 3]."""

    @abstractmethod
    def sample_first(self, force: Forces, num_samples: int, generator: np.random.Generator) -> Firsts:
        """Draw the first number of actions that give each force, (num_samples, rows)."""

    @abstractmethod
    def complete(self, first: Firsts, force: Forces) -> Float64[np.ndarray, "*samples rows action_dim"]:
        """Return the whole action from its first number and its force."""

    @abstractmethod
    def log_density(self, force: Forces, first: Firsts) -> Firsts:
        """Return the log density of the first number given the force: -inf where no action has it, inf at a point."""

    @abstractmethod
    def entropy(self, force: Forces) -> Forces:
        """Return the differential entropy of the first number given the force, nats; -inf at a point."""


class TwoFactor(Actuation):
    """Force 3 a1 a2, each factor in [-1, 1]: the two branches of a hyperbola.

    With c = a1 a2 in place of a2 the uniform density 1/4 becomes 1 / (4 |a1|) on |c| <= |a1| <= 1, so given c the
    logarithm of |a1| is uniform on [ln |c|, 0] and the sign of a1 is a fair coin.
    """

    low, high = (-1.0, -1.0), (1.0, 1.0)

    @override
    def force(self, action: Float[np.ndarray, "*batch action_dim"]) -> Float64[np.ndarray, "*batch"]:
        values = np.asarray(action, np.float64)
        return np.asarray(MAX_FORCE * values[..., 0] * values[..., 1])

    @override
    def sample_first(self, force: Forces, num_samples: int, generator: np.random.Generator) -> Firsts:
        logarithm = np.log(_size(force)) * generator.random((num_samples, len(force)))
        return np.asarray(np.exp(logarithm) * generator.choice([-1.0, 1.0], logarithm.shape))

    @override
    def complete(self, first: Firsts, force: Forces) -> Float64[np.ndarray, "*samples rows action_dim"]:
        # Where the product is 0 either factor may be it; the first is drawn away from 0.
        return np.stack([first, np.clip(force / MAX_FORCE / first, -1.0, 1.0)], axis=-1)

    @override
    def log_density(self, force: Forces, first: Firsts) -> Firsts:
        size, absolute = _size(force), np.abs(first)
        inside = (absolute >= size * (1.0 - _ROUNDING)) & (absolute <= 1.0)
        density = -np.log(-2.0 * np.log(size)) - np.log(np.where(inside, absolute, 1.0))
        return np.where(inside, density, -np.inf)

    @override
    def entropy(self, force: Forces) -> Forces:
        length = -np.log(_size(force))
        return np.asarray(np.log(2.0 * length) - length / 2.0)


class AntagonistPair(Actuation):
    """Force 3 (u1 - u2), each pull in [0, 1]: the segment of a square's diagonal; uniform along it."""

    low, high = (0.0, 0.0), (1.0, 1.0)

    @override
    def force(self, action: Float[np.ndarray, "*batch action_dim"]) -> Float64[np.ndarray, "*batch"]:
        values = np.asarray(action, np.float64)
        return np.asarray(MAX_FORCE * (values[..., 0] - values[..., 1]))

    @override
    def sample_first(self, force: Forces, num_samples: int, generator: np.random.Generator) -> Firsts:
        return _uniform(*self._interval(force), num_samples, generator)

    @override
    def complete(self, first: Firsts, force: Forces) -> Float64[np.ndarray, "*samples rows action_dim"]:
        return np.stack([first, np.clip(first - force / MAX_FORCE, 0.0, 1.0)], axis=-1)

    @override
    def log_density(self, force: Forces, first: Firsts) -> Firsts:
        return _uniform_log_density(*self._interval(force), first)

    @override
    def entropy(self, force: Forces) -> Forces:
        return _uniform_entropy(*self._interval(force))

    def _interval(self, force: Forces) -> tuple[Forces, Forces]:
        difference = np.clip(force / MAX_FORCE, -1.0, 1.0)
        return np.maximum(difference, 0.0), np.minimum(1.0 + difference, 1.0)


class DeadZone(Actuation):
    """No force for |a| < .15, the full force 3 for |a| > 2/3, linear between; one action in [-1, 1].

    Given no force, or the full one, the action is uniform on an interval; else it is a point.
    """

    low, high = (-1.0,), (1.0,)
    dead, saturated = 0.15, 2.0 / 3.0

    @override
    def force(self, action: Float[np.ndarray, "*batch action_dim"]) -> Float64[np.ndarray, "*batch"]:
        value = np.asarray(action, np.float64)[..., 0]
        share = (np.abs(value) - self.dead) / (self.saturated - self.dead)
        return np.asarray(MAX_FORCE * np.sign(value) * np.clip(share, 0.0, 1.0))

    @override
    def sample_first(self, force: Forces, num_samples: int, generator: np.random.Generator) -> Firsts:
        return _uniform(*self._interval(force), num_samples, generator)

    @override
    def complete(self, first: Firsts, force: Forces) -> Float64[np.ndarray, "*samples rows action_dim"]:
        return first[..., None]

    @override
    def log_density(self, force: Forces, first: Firsts) -> Firsts:
        return _uniform_log_density(*self._interval(force), first)

    @override
    def entropy(self, force: Forces) -> Forces:
        return _uniform_entropy(*self._interval(force))

    def _interval(self, force: Forces) -> tuple[Forces, Forces]:
        size, sign = np.abs(force), np.sign(force)
        middle = self.dead + np.minimum(size / MAX_FORCE, 1.0) * (self.saturated - self.dead)
        full, none = size >= MAX_FORCE - FORCE_TOLERANCE, size <= FORCE_TOLERANCE
        near = np.where(none, -self.dead, np.where(full, self.saturated, middle))
        far = np.where(none, self.dead, np.where(full, 1.0, middle))
        flipped = sign < 0
        return np.where(flipped, -far, near), np.where(flipped, -near, far)


ACTUATIONS: dict[str, Actuation] = {
    "two_factor": TwoFactor(),
    "antagonist": AntagonistPair(),
    "dead_zone": DeadZone(),
}

_ROUNDING = 1e-6
_SMALLEST = 1e-12


def _size(force: Forces) -> Forces:
    """Return |c| of the product c, below 1 and above 0, where the hyperbola would have no length or no end."""
    return np.asarray(np.clip(np.abs(force) / MAX_FORCE, _SMALLEST, 1.0 - _SMALLEST))


def _uniform(low: Forces, high: Forces, num_samples: int, generator: np.random.Generator) -> Firsts:
    return np.asarray(low + (high - low) * generator.random((num_samples, len(low))))


def _uniform_log_density(low: Forces, high: Forces, first: Firsts) -> Firsts:
    inside = (first >= low - _ROUNDING) & (first <= high + _ROUNDING)
    return np.where(inside, -_uniform_entropy(low, high), -np.inf)


def _uniform_entropy(low: Forces, high: Forces) -> Forces:
    width = high - low
    return np.where(width > 0, np.log(np.where(width > 0, width, 1.0)), -np.inf)
