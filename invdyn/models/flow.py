"""The main model: a conditional flow that carries N(0, I) to the action of a transition.

Source: Lipman, Chen, Ben-Hamu, Nickel & Le, "Flow Matching for Generative Modeling" (2023), with the straight path of
Liu, Gong & Liu, "Flow Straight and Fast" (2023): x_t = (1 - t) x_0 + t x_1, with t = 0 noise and t = 1 action.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from invdyn.errors import ConfigError
from invdyn.models.base import InverseDynamics, Noise
from invdyn.models.bounds import ActionBounds, BoundRule, Bounds
from invdyn.models.conditional_base import (
    Conditional,
    ConditionalBase,
    compress,
    conditional_loss,
    expand,
    largest_residual,
    log_volume,
    mean_loss,
    residual_of,
    target_of,
)
from invdyn.models.density import flow_log_prob
from invdyn.models.solvers import QUARTER_TURN, Velocity, get_solver
from invdyn.models.velocity import NETWORKS, NetworkKind, VelocityNetwork

PredictionKind = Literal["velocity", "target", "angular"]
FlowBaseKind = Literal["none", "linear", "mlp"]

BLOCK_ROWS = 4096
"""Samples that are carried at once on a CPU: with 19,000 the solver takes up to twice as long per sample."""


class SamplingSetting(NamedTuple):
    """How samples are drawn.

    Attributes:
        solver: name of the solver.
        num_inference_steps: its steps.
    """

    solver: str
    num_inference_steps: int


class FlowInverseDynamics(InverseDynamics):
    """Conditional flow matching on (normalised residuals of) actions.

    Args:
        state_dim: size of one state.
        action_dim: size of one action.
        diffusion_step_embed_dim: size of the time embedding, even.
        down_dims: widths of the network: the levels of the U-Net, or the hidden layers of the others.
        num_inference_steps: solver steps of `sample` unless it is told otherwise.
        network: "unet" (the reference network), "film" or "mlp".
        prediction: what the network returns: "velocity" x_1 - x_0; the "target" x_1 itself, which needs the fewest
            steps where the action is nearly determined by the transition; or "angular", the velocity along the circle
            cos(angle) x_0 + sin(angle) x_1 at inputs of unit variance, which gives both the mean (one "euler" step)
            and calibrated samples (angular solvers).
        base: "linear" to carry noise to the whitened residual of the ridge solution; "mlp" to put a regression with a
            spread of its own, trained first, on top of it (see `ConditionalBase`); "none".
        base_dims: hidden layers of the "mlp" base; the network sees the features of the last one.
        base_gates: how many units of the first of them are gated (see `GatedSiLU`).
        base_tails: spreads from the base's mean beyond which the flow sees distances by their logarithm; None for all
            as they are.
        time_grading: 1 to train at all times alike; above, more often near t = 1, at 1 - (1 - u)^time_grading of
            uniform u: a thin target, as on branches, is made there. An "mlp" base makes it wide beforehand.
        normalize: standardise inside the model.
        solver: name of the solver, see `invdyn.models.solvers`.
        action_bounds: (low, high), each one number or one per action dimension; None for unbounded actions.
        at_bounds: what becomes of samples outside: "reflect" or "clip", see `Bounds`.
        history: number of past states.
        horizon: number of actions predicted.

    Raises:
        ConfigError: when a size is below 1, `diffusion_step_embed_dim` is odd, a name is unknown, there are more gates
            than units, `base_tails` is not positive, `time_grading` is below 1, or the bounds are no intervals of
            `action_dim` numbers.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        diffusion_step_embed_dim: int = 16,
        down_dims: Sequence[int] = (16, 32, 64),
        num_inference_steps: int = 10,
        *,
        network: NetworkKind = "unet",
        prediction: PredictionKind = "velocity",
        base: FlowBaseKind = "linear",
        base_dims: Sequence[int] = (128, 128, 128),
        base_gates: int = 0,
        base_tails: float | None = None,
        time_grading: float = 1.0,
        normalize: bool = True,
        solver: str = "euler",
        action_bounds: ActionBounds | None = None,
        at_bounds: BoundRule = "reflect",
        history: int = 0,
        horizon: int = 1,
    ) -> None:
        super().__init__(
            state_dim,
            action_dim,
            history=history,
            horizon=horizon,
            base="none" if base == "none" else "linear",
            normalize=normalize,
        )
        if diffusion_step_embed_dim < 2 or diffusion_step_embed_dim % 2:
            raise ConfigError(f"diffusion_step_embed_dim must be even and positive, got {diffusion_step_embed_dim}")
        _check_widths("down_dims", down_dims)
        _check_name("network", network, NETWORKS)
        _check_name("prediction", prediction, get_args(PredictionKind))
        _check_name("base", base, get_args(FlowBaseKind))
        get_solver(solver)
        _check_steps(num_inference_steps)
        if base_tails is not None and not 0.0 < base_tails < math.inf:
            raise ConfigError(f"base_tails must be a positive number or null, got {base_tails}")
        if not 1.0 <= time_grading < math.inf:
            raise ConfigError(f"time_grading must be a number from 1, got {time_grading}")
        self.num_inference_steps = num_inference_steps
        self.prediction = prediction
        self.time_grading = time_grading
        self.solver = solver
        self.conditional: ConditionalBase | None = None
        self.tails = base_tails if base == "mlp" else None
        self.largest = largest_residual(self.tails)  # of x_1 in training
        features = 0
        if base == "mlp":
            _check_widths("base_dims", base_dims)
            if not 0 <= base_gates <= base_dims[0]:
                raise ConfigError(f"base_gates must be from 0 to base_dims[0] = {base_dims[0]}, got {base_gates}")
            self.conditional = ConditionalBase(self.context_dim, self.target_dim, base_dims, base_gates, self.tails)
            features = base_dims[-1]
            self.num_stages = 2
        self.network: VelocityNetwork = NETWORKS[network](
            self.target_dim, self.context_dim + features, diffusion_step_embed_dim, down_dims
        )
        if base == "mlp":  # until the flow is trained, one Euler step is the base's mean
            nn.init.zeros_(self.network.last_layer().weight)
            nn.init.zeros_(self.network.last_layer().bias)
        self.bounds = Bounds(action_bounds, at_bounds, action_dim, horizon) if action_bounds is not None else None
        self.validated: frozenset[SamplingSetting] | None = None
        self.spreads: dict[SamplingSetting, tuple[float, ...]] = {}

    @override
    def enter_stage(self, stage: int) -> None:
        """Train the "mlp" base in stage 0; then fix it, and train its spread and the flow in stage 1.

        A flow that is trained beside its base learns the errors of weights that still move. On a fixed base it learns
        those that are there, their sign included, as far as they follow from the transition.
        """
        super().enter_stage(stage)
        if self.conditional is None:
            return
        of_base = {id(parameter) for parameter in self.conditional.parameters_of_mean()}
        for parameter in self.parameters():
            parameter.requires_grad_((id(parameter) in of_base) == (stage == 0))

    @override
    def stage_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        if self.conditional is None or self.stage == 1:
            return self.encoded_loss(context, target, noise)
        return mean_loss(self.weighed_error(self.conditional.mean_of(context), target))

    @override
    def encoded_loss(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"], noise: Noise
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of the network's prediction at x_t, plus the loss of an "mlp" base.

        Args:
            context: (batch, context_dim), from `encode`.
            target: (batch, target_dim), from `encode`: x_1, or with an "mlp" base what x_1 is the residual of.
            noise: x_0 (batch, target_dim) and t (batch, 1), from `draw_noise`.
        """
        seen, found = self.condition(context)
        if found is None:
            return self.flow_loss(seen, target, *noise)
        x_1 = residual_of(found, target).detach().clamp(-self.largest, self.largest)
        return conditional_loss(found, target) + self.flow_loss(seen.detach(), x_1, *noise)

    def flow_loss(
        self,
        seen: Float[Tensor, "batch seen"],
        x_1: Float[Tensor, "batch target"],
        x_0: Float[Tensor, "batch target"],
        t: Float[Tensor, "batch 1"],
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of the network's prediction between pairs of noise and target.

        Args:
            seen: of `condition`.
            x_1: as `carry` returns it.
            x_0: noise.
            t: in [0, 1]; for prediction "angular" the share of the quarter turn.
        """
        if self.prediction == "angular":
            sine, cosine = (QUARTER_TURN * t).sin(), (QUARTER_TURN * t).cos()
            prediction = self.network(cosine * x_0 + sine * x_1, t, seen)
            return functional.mse_loss(prediction, cosine * x_1 - sine * x_0)
        prediction = self.network(torch.lerp(x_0, x_1, t), t, seen)
        return functional.mse_loss(prediction, x_1 if self.prediction == "target" else x_1 - x_0)

    @override
    def draw_noise(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Noise:
        """Draw x_0 ~ N(0, I), (batch, target_dim), and t in [0, 1], (batch, 1), uniform but for `time_grading`."""
        x_0 = torch.randn(batch_size, self.target_dim, generator=generator, device=device)
        t = torch.rand(batch_size, 1, generator=generator, device=device)
        return x_0, t if self.time_grading == 1.0 else 1.0 - (1.0 - t) ** self.time_grading

    @override
    def decode(
        self, target: Float[Tensor, "samples batch target"], mean: Float[Tensor, "batch target"]
    ) -> Float[Tensor, "samples batch *horizon action_dim"]:
        """Return actions in physical units, inside the bounds if there are any."""
        action = super().decode(target, mean)
        if self.bounds is None:
            return action
        inside: Tensor = self.bounds(action.reshape(target.shape))
        return inside.reshape(action.shape)

    def use_sampling(self, chosen: SamplingSetting, validated: Iterable[SamplingSetting]) -> None:
        """Sample with `chosen` from now on, and refuse what is not among `validated`."""
        self.num_inference_steps, self.solver = chosen.num_inference_steps, chosen.solver
        self.validated = frozenset(validated) | {chosen}

    @override
    def check_sampling(self, num_inference_steps: int | None, solver: str | None) -> None:
        """Refuse a solver or number of steps that the model was not validated with, if it says with which it was.

        Raises:
            ConfigError: naming the validated ones.
        """
        setting = self._setting(num_inference_steps, solver)
        if self.validated is not None and setting not in self.validated:
            known = ", ".join(f"{solver} x {steps}" for solver, steps in sorted(self.validated))
            raise ConfigError(
                f"sample needs a solver and a number of steps that the checkpoint was validated with: got "
                f"{setting.solver} x {setting.num_inference_steps}, validated: {known}; use one of them, or say "
                "allow_unvalidated=True"
            )

    @override
    def _sample_targets(
        self,
        context: Float[Tensor, "batch context"],
        num_samples: int,
        num_inference_steps: int | None,
        solver: str | None,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "samples batch target"]:
        shape = (num_samples, len(context), self.target_dim)
        x_0 = torch.randn(shape, generator=generator, device=context.device)
        return self.targets_in_blocks(context, x_0, num_inference_steps, solver)

    def targets_in_blocks(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        """Return the targets that noise becomes: on a CPU block by block, whose activations stay in its cache.

        Args:
            context: (batch, context_dim), from `encode`.
            noise: (num_samples, batch, noise_dim) of N(0, I).
            num_inference_steps: as in `sample`.
            solver: as in `sample`.
        """
        setting = self._setting(num_inference_steps, solver)
        seen, found = self.condition(context)
        rows = max(1, BLOCK_ROWS // len(noise)) if context.device.type == "cpu" else len(context)
        return self._on_base(self.carry_in_blocks(seen, noise, setting, rows), found)

    @override
    def _targets_from_noise(
        self,
        context: Float[Tensor, "batch context"],
        noise: Float[Tensor, "samples batch noise"],
        num_inference_steps: int | None,
        solver: str | None,
    ) -> Float[Tensor, "samples batch target"]:
        setting = self._setting(num_inference_steps, solver)
        seen, found = self.condition(context)
        return self._on_base(self.carry(seen, noise, setting), found)

    def condition(
        self, context: Float[Tensor, "batch context"]
    ) -> tuple[Float[Tensor, "batch seen"], Conditional | None]:
        """Return what the network sees of a context, and what an "mlp" base says of its target."""
        if self.conditional is None:
            return context, None
        found: Conditional = self.conditional(context)
        return torch.cat([context, found.features], dim=1), found

    def carry(
        self, seen: Float[Tensor, "batch seen"], x_0: Float[Tensor, "samples batch target"], setting: SamplingSetting
    ) -> Float[Tensor, "samples batch target"]:
        """Return x_1 of noise: the residual of an "mlp" base, else the target itself."""
        velocity, method = self._velocity(seen, self.network), get_solver(setting.solver)
        spread = self.spread_of(setting)
        if spread is None:
            return self._as_in_training(method.integrate(velocity, x_0, setting.num_inference_steps))
        first = FirstEvaluation(velocity)
        x_1 = self._as_in_training(method.integrate(first, x_0, setting.num_inference_steps))
        # In units of the target: that is how a spread is calibrated.
        mean = expand(self._as_in_training(first.end), self.tails)
        return compress(torch.lerp(mean, expand(x_1, self.tails), _vector(spread, x_1)), self.tails)

    def _as_in_training(self, x_1: Float[Tensor, "samples batch target"]) -> Float[Tensor, "samples batch target"]:
        """Return what an "mlp" base leaves, no larger than targets of the training."""
        return x_1 if self.conditional is None else x_1.clamp(-self.largest, self.largest)

    def _on_base(
        self, x_1: Float[Tensor, "*samples batch target"], found: Conditional | None
    ) -> Float[Tensor, "*samples batch target"]:
        """Return the targets of what `carry` gives."""
        return x_1 if found is None else target_of(found, x_1)

    def carry_in_blocks(
        self,
        seen: Float[Tensor, "batch seen"],
        x_0: Float[Tensor, "samples batch target"],
        setting: SamplingSetting,
        rows: int,
    ) -> Float[Tensor, "samples batch target"]:
        """Return what `carry` does, of so many rows at once."""
        if len(seen) <= rows:
            return self.carry(seen, x_0, setting)
        blocks = zip(seen.split(rows), x_0.split(rows, dim=1), strict=True)
        return torch.cat([self.carry(*block, setting) for block in blocks], dim=1)

    def spread_of(self, setting: SamplingSetting | None = None) -> tuple[float, ...] | None:
        """Return the calibrated factors on the spread of samples, one per target dimension; None for 1.

        Args:
            setting: how samples are drawn; for one that was not calibrated, and for None, those of the finest.
        """
        if not self.spreads:
            return None
        finest = max(self.spreads, key=network_evaluations)
        spread = self.spreads.get(setting or finest, self.spreads[finest])
        return None if set(spread) == {1.0} else spread

    def _setting(self, num_inference_steps: int | None, solver: str | None) -> SamplingSetting:
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        _check_steps(steps)
        name = solver or self.solver
        get_solver(name)
        return SamplingSetting(name, steps)

    def _velocity(self, context: Float[Tensor, "batch context"], network: VelocityNetwork) -> Velocity:
        """Return the velocity field of fixed transitions; the work that depends on them alone is done once, here."""
        embedded = network.embed_context(context)

        def predict(x: Tensor, t: float) -> Tensor:
            return network.combine(x, embedded + network.embed_time(torch.full_like(embedded[:1, :1], t)))

        def of_target(x: Tensor, t: float) -> Tensor:
            return (predict(x, t) - x) / (1.0 - t)

        def of_angle(x: Tensor, t: float) -> Tensor:
            sigma = math.hypot(t, 1.0 - t)
            y = x / sigma
            turned = predict(y, math.atan2(t, 1.0 - t) / QUARTER_TURN)
            if self.normalize:  # no larger than in training: beyond, a network may be so steep that paths explode
                turned = turned.clamp(-self.largest, self.largest)
            return turned.add(y, alpha=2.0 * t - 1.0) / sigma

        return {"velocity": predict, "target": of_target, "angular": of_angle}[self.prediction]

    @override
    def log_prob(
        self,
        state: Float[Tensor, "batch window_dim"],
        action: Float[Tensor, "batch *horizon action_dim"],
        next_state: Float[Tensor, "batch state_dim"],
    ) -> Float[Tensor, " batch"]:
        """Return ln p(action | state, next_state) in nats of the flow solved exactly; see `InverseDynamics.log_prob`.

        It is the density of `sample` in the limit of many steps. Outside the bounds it is -inf; samples that the bounds
        reflect count where they end up.

        Raises:
            DataError: when a shape does not fit the model.
            ConfigError: for prediction "target", whose velocity has no limit at t = 1; for actions on a bound that
                samples are clipped to, where they have a probability instead of a density; for an action that never
                varies.
        """
        if self.bounds is None:
            return super().log_prob(state, action, next_state)
        flat = action.reshape(len(action), -1)
        inside = self.bounds.contains(flat)
        if self.bounds.rule == "clip":
            self._check_no_mass(flat)
            log_density = super().log_prob(state, action, next_state)
        else:
            images = torch.stack(self.bounds.images(flat))
            before, after = (states.repeat(len(images), 1) for states in (state, next_state))
            found = super().log_prob(before, images.reshape(-1, *action.shape[1:]), after)
            log_density = torch.logsumexp(found.view(len(images), -1), dim=0)
        return log_density.masked_fill(~inside, -math.inf)

    def _check_no_mass(self, action: Float[Tensor, "batch dims"]) -> None:
        assert self.bounds is not None
        if count := int(self.bounds.on_bound(action).sum()):
            raise ConfigError(
                f"log_prob needs actions inside the bounds: {count} of {len(action)} lie on one, where clipped samples "
                "have a probability and no density; leave those rows out, or train with at_bounds: reflect"
            )

    @override
    def _target_log_prob(
        self, context: Float[Tensor, "batch context"], target: Float[Tensor, "batch target"]
    ) -> Float[Tensor, " batch"]:
        if self.prediction == "target":
            raise ConfigError(
                "log_prob needs prediction velocity or angular: the velocity that prediction target implies, "
                "(x_1 - x_t) / (1 - t), has no limit at t = 1"
            )
        network = copy.deepcopy(self.network).double()
        with torch.no_grad():
            seen, found = self.condition(context)
            velocity = self._velocity(seen.double(), network)
            volume = target.new_zeros(len(target))
            if found is not None:
                found = found._replace(mean=found.mean.double(), log_scale=found.log_scale.double())
            if (factors := self.spread_of()) is not None:
                spread = target.new_tensor(factors)
                mean = self._on_base(velocity(torch.zeros_like(target), 0.0), found)
                target = mean + (target - mean) / spread
                volume = volume + spread.log().sum()
            if found is not None:
                target = residual_of(found, target)
                volume = volume + log_volume(found, target)
            return flow_log_prob(velocity, target) - volume


def _vector(values: Sequence[float], like: Tensor) -> Float[Tensor, " values"]:
    """Return values as a tensor; in an exported program, computed there: a constant would stay on the CPU."""
    if torch.compiler.is_exporting():
        return torch.cat([like.new_full((1,), value) for value in values])
    return like.new_tensor(values)


def network_evaluations(setting: SamplingSetting) -> int:
    """Return how often a setting asks the network per sample."""
    return setting.num_inference_steps * get_solver(setting.solver).evaluations_per_step


class FirstEvaluation:
    """A velocity field that remembers where its first evaluation points, at x_0 and t = 0: to the mean of x_1.

    Args:
        velocity: the field.
    """

    def __init__(self, velocity: Velocity):
        self.velocity = velocity
        self.end: Tensor

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return the velocity at x_t = `x`."""
        found = self.velocity(x, t)
        if t == 0.0:
            self.end = x + found
        return found


def _check_steps(num_inference_steps: int) -> None:
    if num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps must be 1 or more, got {num_inference_steps}")


def _check_widths(name: str, widths: Sequence[int]) -> None:
    if not widths or min(widths) < 1:
        raise ConfigError(f"{name} must be one or more positive widths, got {list(widths)}")


def _check_name(key: str, value: str, known: Iterable[str]) -> None:
    names = tuple(known)
    if value not in names:
        raise ConfigError(f"{key} must be one of {', '.join(names)}, got {value!r}")
