"""A model with its optimizer, learning-rate schedule and moving average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from invdyn.errors import DataError
from invdyn.models.base import InverseDynamics, Noise
from invdyn.models.recipe import TrainingRecipe
from invdyn.training.batches import Rows, Share
from invdyn.training.checkpoint import list_checkpoints, load_trainer_state
from invdyn.training.compiled import CompiledStep, Member, autocast
from invdyn.training.run_config import RunConfig
from invdyn.training.worker import Worker
from invdyn.url_path import AnyPath


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    context: Float[Tensor, "batch context"],
    target: Float[Tensor, "batch target"],
    noise: Noise,
    max_grad_norm: float | None = None,
    precision: torch.dtype = torch.float32,
    loss_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Take one optimizer step and return its loss, still on the device, by this worker's weight among all."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(context.device, precision):
        loss: Tensor = module(context, target, *noise)
    if loss_weight != 1.0:
        loss = loss * loss_weight
    loss.backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm, foreach=True)
    optimizer.step()
    return loss.detach()


def learning_rates(recipe: TrainingRecipe, first: int, count: int, total_steps: int) -> Float64[np.ndarray, " count"]:
    """Return the learning rates of `count` steps: linear warm-up, then constant or half a cosine to zero."""
    warmup = max(1, round(recipe.warmup_fraction * total_steps)) if recipe.warmup_fraction else 0
    return recipe.learning_rate * _shares(recipe.schedule, warmup, first, count, total_steps)


@lru_cache(maxsize=8)  # the runs of a population ask for the same
def _shares(schedule: str, warmup: int, first: int, count: int, total_steps: int) -> Float64[np.ndarray, " count"]:
    steps = np.arange(first, first + count)
    done = np.maximum(0, steps - warmup) / max(1, total_steps - warmup)
    shares: Float64[np.ndarray, " count"] = (
        0.5 * (1.0 + np.cos(np.pi * done)) if schedule == "cosine" else np.ones(count)
    )
    return shares * np.minimum(1.0, (steps + 1) / warmup) if warmup else shares


def average_decays(recipe: TrainingRecipe, first: int, count: int) -> Float64[np.ndarray, " count"]:
    """Return the decays of the moving average: its first steps must forget the random start quickly."""
    decays: Float64[np.ndarray, " count"] = np.minimum(recipe.ema_decay or 0.0, _early_decays(first, count))
    return decays


@lru_cache(maxsize=8)
def _early_decays(first: int, count: int) -> Float64[np.ndarray, " count"]:
    steps = np.arange(first, first + count)
    decays: Float64[np.ndarray, " count"] = (1 + steps) / (10 + steps)
    return decays


def split_chunk(rows: Rows, noise: Noise, steps: int) -> Iterator[tuple[Rows, Noise]]:
    """Yield the first `steps` batches of a chunk, then the rest."""
    for part in (slice(steps), slice(steps, None)):
        context, target = rows
        yield (context[part], target[part]), tuple(values[part] for values in noise)


class Trainer:
    """A model with its optimizer, schedule and moving average.

    Args:
        model: on the worker's device.
        recipe: how to train it.
        total_steps: length of the schedule.
        worker: this process.
        compiled: take the steps of one worker as one graph; several compile the model.
        precision: dtype of the products of the forward and backward pass.
    """

    def __init__(
        self,
        model: InverseDynamics,
        recipe: TrainingRecipe,
        total_steps: int,
        worker: Worker,
        compiled: bool = False,
        precision: torch.dtype = torch.float32,
    ):
        self.model, self.recipe, self.total_steps, self.worker = model, recipe, total_steps, worker
        self.average = copy.deepcopy(model).requires_grad_(False) if recipe.ema_decay is not None else model
        self.compiled = compiled
        self.precision = precision
        self.loss_weight = Share(recipe.batch_size, worker.rank, worker.world_size).loss_weight
        self.step = 0
        first = min(round(recipe.base_fraction * total_steps), total_steps - 1)  # the last is never without a step
        # Begin and end of each stage of the model, in steps.
        self.stages = [(0, first), (first, total_steps)] if model.num_stages == 2 else [(0, total_steps)]
        self._start_stage(self._stage_of(0))

    def _start_stage(self, stage: int) -> None:
        self.model.enter_stage(stage)
        self.model.zero_grad(set_to_none=True)  # what is fixed now must not count in the gradient's norm
        self.average.stage = stage
        model: nn.Module = torch.compile(self.model) if self.compiled else self.model  # type: ignore[assignment]
        self.module = self.worker.wrap(model)
        both = zip(self.model.parameters(), self.average.parameters(), strict=True)
        trained = [(own, average) for own, average in both if own.requires_grad]
        self.parameters: list[Tensor] = [own for own, _ in trained]
        self.average_parameters: list[Tensor] = [average for _, average in trained]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay, fused=True
        )
        self.one_graph: CompiledStep | None = None

    def enter_stage(self) -> bool:
        """Go on to the next stage of training if its first step comes next; return whether it does."""
        stage = self._stage_of(self.step)
        if stage == self.model.stage:
            return False
        with torch.no_grad():  # what was trained so far is fixed at its average
            for own, average in zip(self.model.parameters(), self.average.parameters(), strict=True):
                own.copy_(average)
        self._start_stage(stage)
        return True

    def steps_left_in_stage(self) -> int:
        """Return how many steps the stage of the next step still has; at least 1."""
        return max(1, self._span(self.step)[1] - self.step)

    def _stage_of(self, step: int) -> int:
        return sum(step >= end for _, end in self.stages[:-1])

    def _span(self, step: int) -> tuple[int, int]:
        return self.stages[self._stage_of(step)]

    def train_chunk(self, rows: Rows, noise: Noise) -> Float[Tensor, "steps"]:
        """Take one step per batch of a chunk.

        Args:
            rows: (context, target), each (steps, local batch, columns).
            noise: the same layout.

        Returns:
            The loss of each step, on the device.
        """
        left = self.steps_left_in_stage()
        if left < len(rows[0]):
            return torch.cat([self.train_chunk(*part) for part in split_chunk(rows, noise, left)])
        self.enter_stage()
        if self.compiled and self.worker.world_size == 1:
            return self._train_chunk_compiled(rows, noise)
        losses = []
        rates, decays = self.schedule(len(rows[0]))
        for rate, decay, context, target, *batch_noise in zip(rates, decays, *rows, *noise, strict=True):
            self.optimizer.param_groups[0]["lr"] = float(rate)
            losses.append(
                train_step(
                    self.module,
                    self.optimizer,
                    context,
                    target,
                    tuple(batch_noise),
                    self.recipe.max_grad_norm,
                    self.precision,
                    self.loss_weight,
                )
            )
            self._update_average(float(decay))
            self.step += 1
        return torch.stack(losses)

    def _train_chunk_compiled(self, rows: Rows, noise: Noise) -> Float[Tensor, "steps"]:
        if self.one_graph is None:  # not before `restore`: it takes over the memory of weights and optimizer
            self.one_graph = CompiledStep([self.member()], self.recipe.max_grad_norm, self.precision)
        rates, decays = self.schedule(len(rows[0]))
        losses = self.one_graph(self.one_graph.coefficients(rates[None], decays[None]), (*rows, *noise))
        self.advance(rates)
        return losses

    def member(self) -> Member:
        """Return what a compiled step trains of this."""
        average = self.average_parameters if self.average is not self.model else []
        return Member(self.model, self.optimizer, average)

    def schedule(self, count: int) -> tuple[Float64[np.ndarray, " count"], Float64[np.ndarray, " count"]]:
        """Return the learning rates and the decays of the average of the next steps; each stage has its own."""
        begin, end = self._span(self.step)
        first = self.step - begin
        return learning_rates(self.recipe, first, count, end - begin), average_decays(self.recipe, first, count)

    def advance(self, rates: Float64[np.ndarray, " steps"]) -> None:
        """Count steps that a compiled step has taken at these learning rates."""
        self.optimizer.param_groups[0]["lr"] = float(rates[-1])
        self.step += len(rates)

    def state(self, epoch: int) -> dict[str, Any]:
        """Return what `restore` needs: tensors and plain values."""
        return {
            "epoch": epoch,
            "step": self.step,
            "weights": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, config: RunConfig) -> int:
        """Continue from the run's latest checkpoint, if there is one, and return the epoch to start with.

        Raises:
            DataError: when the checkpoint cannot be read, or belongs to another model.
        """
        found = list_checkpoints(config.run_dir)
        return self.load(found[-1]) if found else 0

    def load(self, folder: AnyPath) -> int:
        """Continue from a checkpoint, and return the epoch to start with.

        Raises:
            DataError: when the checkpoint cannot be read, or belongs to another model.
        """
        state = load_trainer_state(folder, self.worker.device)
        try:
            stage = self._stage_of(max(0, int(state["step"]) - 1))  # of the last step: the optimizer is that stage's
            if stage != self.model.stage:
                self._start_stage(stage)
            self.model.load_state_dict(state["weights"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, epoch = int(state["step"]), int(state["epoch"])
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"trainer state does not fit the run: {folder}: {reason}; start a new run") from None
        return epoch

    def _update_average(self, decay: float) -> None:
        if self.recipe.ema_decay is not None:
            torch._foreach_lerp_(self.average_parameters, self.parameters, 1.0 - decay)
