"""What the `collect:` section of a dataset YAML says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from invdyn.config import Config

PHYSICS_SHIFT_ID = "PhysicsShift-v0"

Positive = Annotated[float, Field(gt=0.0)]
Range = tuple[float, float]
DimensionRanges = dict[Annotated[int, Field(ge=0)], float | Range] | tuple[float | Range | None, ...]
"""Ranges of some state dimensions: {index: limit or [low, high]}, or a list with null where there is none."""


class PhysicsConfig(Config):
    """Multipliers of a task's physics, and a constant added to its actions.

    Attributes:
        mass: of the masses and inertias of all bodies.
        gear: of the gears of all actuators.
        friction: of contact friction and of dry friction in joints and tendons.
        damping: of the damping of joints, tendons and actuators.
        armature: of the rotor inertia of joints, tendons and actuators.
        action_offset: added to every action before the simulator sees it; one number, or one per action dimension.
    """

    mass: Positive = 1.0
    gear: Positive = 1.0
    friction: Annotated[float, Field(ge=0.0)] = 1.0
    damping: Annotated[float, Field(ge=0.0)] = 1.0
    armature: Annotated[float, Field(ge=0.0)] = 1.0
    action_offset: float | tuple[float, ...] = 0.0

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the task's own physics."""
        defaults = PhysicsConfig().model_dump()
        return {name: value for name, value in self.model_dump(mode="json").items() if value != defaults[name]}


class ActionRangeConfig(Config):
    """Where a policy may act.

    Attributes:
        low: lowest action, one number or one per dimension; by default the lowest one that the simulator does not clip.
        high: highest action, likewise. Of clipped actions only the bound has an effect, so no model can recover them.
    """

    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None


class UniformPolicyConfig(ActionRangeConfig):
    """Independent uniform actions over the whole range."""

    name: Literal["uniform"] = "uniform"


class OrnsteinUhlenbeckPolicyConfig(ActionRangeConfig):
    """Smooth noise around the middle of the range, clipped to the range.

    Attributes:
        std: standard deviation before clipping, as a share of half the range.
        correlation_steps: steps after which the correlation has fallen to 1/e.
    """

    name: Literal["ornstein_uhlenbeck"] = "ornstein_uhlenbeck"
    std: Positive = 0.5
    correlation_steps: Positive = 10.0


class SinusoidPolicyConfig(ActionRangeConfig):
    """A sinusoid per dimension plus white noise, clipped to the range; a new sinusoid in every episode.

    Attributes:
        amplitude: lowest and highest amplitude, as shares of half the range.
        period_steps: shortest and longest period; drawn evenly on a logarithmic scale.
        noise: standard deviation of the white noise, as a share of half the range.
    """

    name: Literal["sinusoid"] = "sinusoid"
    amplitude: tuple[Annotated[float, Field(ge=0.0)], Annotated[float, Field(ge=0.0)]] = (0.2, 1.0)
    period_steps: tuple[Positive, Positive] = (10.0, 100.0)
    noise: Annotated[float, Field(ge=0.0)] = 0.1

    @model_validator(mode="after")
    def _order_ranges(self) -> SinusoidPolicyConfig:
        for name in ("amplitude", "period_steps"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be [low, high] with low <= high, got [{low}, {high}]")
        return self


PolicyConfig = Annotated[
    UniformPolicyConfig | OrnsteinUhlenbeckPolicyConfig | SinusoidPolicyConfig, Field(discriminator="name")
]


class ResetConfig(Config):
    """Where episodes start; by default where the task itself starts them.

    Attributes:
        noise_scale: the task's own `reset_noise_scale`, where it has one.
        state_range: dimensions of the state that are drawn uniformly instead.
    """

    noise_scale: Annotated[float, Field(ge=0.0)] | None = None
    state_range: DimensionRanges | None = None


class CollectConfig(Config):
    """How sequences are recorded in simulation.

    Attributes:
        env_id: Gymnasium id of a MuJoCo task.
        env_kwargs: arguments of the task.
        physics: changes of the task's physics.
        policy: who acts.
        num_episodes: episodes to record.
        max_episode_steps: steps after which an episode ends.
        episodes_per_shard: episodes in one file; one file is the work of one task.
        seed: seed of all episodes.
        reset: where episodes start.
        state_limits: an episode ends before a state on or beyond these limits.
        end_at_termination: whether an episode ends where the task says it is terminated; the last step is kept.
    """

    env_id: str = Field(min_length=1)
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    physics: PhysicsConfig = PhysicsConfig()
    policy: PolicyConfig = UniformPolicyConfig()
    num_episodes: int = Field(default=100, ge=1)
    max_episode_steps: int = Field(default=200, ge=1)
    episodes_per_shard: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)
    reset: ResetConfig = ResetConfig()
    state_limits: DimensionRanges | None = None
    end_at_termination: bool = True

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return -(-self.num_episodes // self.episodes_per_shard)

    def episodes_of(self, shard_index: int) -> range:
        """Return the numbers of the episodes in one file."""
        start = shard_index * self.episodes_per_shard
        return range(start, min(start + self.episodes_per_shard, self.num_episodes))

    @property
    def task(self) -> tuple[str, dict[str, Any]]:
        """The Gymnasium id and arguments that make the task, physics changes included."""
        kwargs: Mapping[str, Any] = self.env_kwargs
        if not self.physics.changes:
            return self.env_id, dict(kwargs)
        return PHYSICS_SHIFT_ID, {"task_id": self.env_id, "task_kwargs": dict(kwargs), **self.physics.changes}
