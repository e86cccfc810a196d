"""A student that needs few steps: first straightened, then trained on where its steps end.

The straight path between x_0 and the sample that the teacher makes of it never crosses another one's, so a network that
has learned it goes from x_0 to the sample in few Euler steps. The student only ever evaluates the times of its steps,
so it is trained at those alone.

Where the teacher's samples part into branches, a student of least squares ends between them. So it is then trained
through all of its steps, by the distance of their end from the teacher's sample, not its square: of several samples
that near starts lead to, the point of least distance is one of them, the point of least squares their mean.

Source: Liu, Gong & Liu, "Flow Straight and Fast" (2023), with the times restricted to those of the solver; the second
part is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from invdyn.errors import ConfigError
from invdyn.models.flow import FlowInverseDynamics, SamplingSetting
from invdyn.models.networks import distance
from invdyn.models.recipe import TrainingRecipe
from invdyn.models.solvers import QUARTER_TURN
from invdyn.training.batches import Rows, encode_rows, epoch_generator
from invdyn.training.checkpoint import list_checkpoints, save_checkpoint
from invdyn.training.run_config import RunConfig
from invdyn.training.sampling import settle_sampling
from invdyn.training.trainer import average_decays, learning_rates
from invdyn.training.validation import Validation
from invdyn.transitions.store import TransitionStore
from invdyn.url_path import AnyPath, as_path

STUDENT = "student"
TEACHER = SamplingSetting("angular_adams", 24)
STUDENT_STREAM = 3
MAX_PAIRS = 400_000
PAIRS_PER_ROW = 2
BLOCK_ROWS = 8_192
STRAIGHT_SHARE, END_SHARE = 0.2, 0.1
"""Steps of each part per step of the teacher."""

END_BATCHES = 2
"""Batch of the second part, in batches of the recipe."""

END_ROUNDING = 0.05
"""Of the distance of ends, in units of the target."""

Pairs = tuple[Float[Tensor, "pairs seen"], Float[Tensor, "pairs target"], Float[Tensor, "pairs target"]]


def train_student(
    config: RunConfig, teacher: FlowInverseDynamics, store: TransitionStore, validation: Validation, teacher_steps: int
) -> AnyPath:
    """Train a student of a finished run, and save it as a run of its own.

    Args:
        config: the teacher's run.
        teacher: its model, calibrated, in eval mode.
        store: the dataset.
        validation: rows to judge the student by.
        teacher_steps: optimizer steps that the teacher took.

    Returns:
        The student's run folder, `RUN_DIR/student`.
    """
    steps = config.training.student_steps
    assert steps is not None
    folder = as_path(config.run_dir) / STUDENT
    if list_checkpoints(folder):  # trained before the run was continued
        return folder
    generator = epoch_generator(config.training.seed, 0, STUDENT_STREAM, teacher.device)
    rows = store.load_spread("train", MAX_PAIRS, columns=("state", "action", "next_state"))
    pairs = draw_pairs(teacher, encode_rows(teacher, rows, teacher.device), generator)
    straight, ends = (max(1, round(share * teacher_steps)) for share in (STRAIGHT_SHARE, END_SHARE))
    student = straighten(teacher, pairs, steps, config.training, straight, generator)
    student = match_ends(student, pairs, steps, config.training, ends, generator)
    model = config.model.replace(num_inference_steps=steps, solver="euler", name=f"{config.model.name}_{STUDENT}")
    own = config.replace(run_dir=str(folder), model=model)
    own.save()
    student.num_inference_steps, student.solver = steps, "euler"
    save_checkpoint(folder, own, straight + ends, student.state_dict(), {}, validation.evaluate(student))
    settle_sampling(own, student, store)
    return folder


@torch.no_grad()
def draw_pairs(teacher: FlowInverseDynamics, rows: Rows, generator: torch.Generator) -> Pairs:
    """Return what the network sees of training rows, noise, and the samples that the teacher makes of it.

    Args:
        teacher: in eval mode.
        rows: encoded.
        generator: of rows and noise, on the teacher's device where the rows are.
    """
    context = rows[0]
    passes = [torch.randperm(len(context), generator=generator, device=context.device) for _ in range(PAIRS_PER_ROW)]
    order = torch.cat(passes)[:MAX_PAIRS]
    seen, _ = teacher.condition(context[order])
    x_0 = torch.randn(len(order), teacher.target_dim, generator=generator, device=context.device)
    return seen, x_0, teacher.carry_in_blocks(seen, x_0[None], TEACHER, BLOCK_ROWS)[0]


def straighten(
    teacher: FlowInverseDynamics,
    pairs: Pairs,
    num_steps: int,
    recipe: TrainingRecipe,
    num_batches: int,
    generator: torch.Generator,
) -> FlowInverseDynamics:
    """Return a copy of the teacher whose network is trained on pairs at the times of `num_steps` Euler steps.

    Args:
        teacher: where the student starts.
        pairs: of `draw_pairs`.
        num_steps: Euler steps of the student.
        recipe: learning rate (half of it is used), schedule and batch size.
        num_batches: optimizer steps.
        generator: of batches and times.
    """
    seen, x_0, x_1 = pairs

    def loss(student: FlowInverseDynamics) -> Float[Tensor, ""]:
        size = (recipe.batch_size,)
        batch = torch.randint(len(seen), size, generator=generator, device=seen.device)
        index = torch.randint(num_steps, (*size, 1), generator=generator, device=seen.device)
        time = network_time(index / num_steps, student.prediction)
        return student.flow_loss(seen[batch], x_1[batch], x_0[batch], time)

    return _train_copy(teacher, loss, recipe, num_batches)


def match_ends(
    straight: FlowInverseDynamics,
    pairs: Pairs,
    num_steps: int,
    recipe: TrainingRecipe,
    num_batches: int,
    generator: torch.Generator,
) -> FlowInverseDynamics:
    """Return a copy of a student, trained by the distance between where its Euler steps end and the paired sample.

    Args:
        straight: of `straighten`.
        pairs: of `draw_pairs`.
        num_steps: Euler steps of the student.
        recipe: as of `straighten`; `END_BATCHES` of its batches make one.
        num_batches: optimizer steps.
        generator: of batches.
    """
    seen, x_0, x_1 = pairs
    setting = SamplingSetting("euler", num_steps)

    def loss(student: FlowInverseDynamics) -> Float[Tensor, ""]:
        size = (END_BATCHES * recipe.batch_size,)
        batch = torch.randint(len(seen), size, generator=generator, device=seen.device)
        off = student.carry(seen[batch], x_0[batch][None], setting)[0] - x_1[batch]
        return distance(off, END_ROUNDING)

    return _train_copy(straight, loss, recipe, num_batches)


def _train_copy(
    flow: FlowInverseDynamics,
    loss: Callable[[FlowInverseDynamics], Tensor],
    recipe: TrainingRecipe,
    num_batches: int,
) -> FlowInverseDynamics:
    """Return an uncalibrated copy with the moving average of its network's weights in training, in eval mode."""
    student = copy.deepcopy(flow)
    student.spreads, student.validated = {}, None
    parameters: list[Tensor] = [p.requires_grad_() for p in student.network.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, fused=True)
    rates = learning_rates(recipe, 0, num_batches, num_batches)
    for rate, decay in zip(rates, average_decays(recipe, 0, num_batches), strict=True):
        optimizer.param_groups[0]["lr"] = 0.5 * float(rate)
        optimizer.zero_grad(set_to_none=True)
        loss(student).backward()
        optimizer.step()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1.0 - float(decay))
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    return student.requires_grad_(False).eval()


def network_time(t: Float[Tensor, "batch 1"], prediction: str) -> Float[Tensor, "batch 1"]:
    """Return a time of the straight path as the loss of a prediction takes it."""
    return torch.atan2(t, 1.0 - t) / QUARTER_TURN if prediction == "angular" else t


def check_student(config: RunConfig) -> None:
    """Check that a run can train a student.

    Raises:
        ConfigError: for a model that is no flow.
    """
    if config.training.student_steps is None:
        return
    if not hasattr(config.model, "num_inference_steps"):
        raise ConfigError(f"training.student_steps needs a flow, got {config.model.target}; leave it null")
