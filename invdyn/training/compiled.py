"""The training step as one compiled graph: forward, backward, AdamW and the moving average on flat vectors.

An eager step of a small network spends most of its time between kernels. Here all parameters are views of one vector,
so that the whole step is a single call into generated code; on a GPU all steps of a chunk are one CUDA graph. Several
models of one shape are trained at once as the rows of a matrix. The models' own parameters and the optimizers' own
state stay views of the same memory: checkpoints do not know the difference.
"""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from invdyn.errors import ConfigError
from invdyn.models.base import InverseDynamics

Flat = Float[Tensor, "*members parameters"]
Chunk = tuple[Tensor, ...]


@dataclass(frozen=True)
class Member:
    """What a step trains.

    Attributes:
        model: trained in place: the parameters that require gradients.
        optimizer: an AdamW over these parameters; its state is read once and kept up to date.
        average: their moving average, kept up to date; empty for none.
    """

    model: InverseDynamics
    optimizer: torch.optim.AdamW
    average: Sequence[Tensor]


class CompiledStep:
    """AdamW steps of one model, or of several of one shape at once. Needs a C++ compiler on a CPU, Triton on a GPU.

    The batch shape must not change between calls: guards, which would cost a tenth of a small step, are left out. What
    is not contiguous is copied: its strides could change with the number of steps.

    Args:
        members: the models, of one shape. Tensors of a call have a leading dimension for them where there are several.
        max_grad_norm: as in the recipe, of each model by itself.
        precision: dtype of the products of the forward and backward pass.
        compiled: False to run the same step without a compiler.

    Raises:
        ConfigError: on a CPU, when there is no C++ compiler.
    """

    def __init__(
        self,
        members: Sequence[Member],
        max_grad_norm: float | None,
        precision: torch.dtype = torch.float32,
        compiled: bool = True,
    ):
        self.model, self.max_grad_norm, self.precision = members[0].model, max_grad_norm, precision
        self.num_members = len(members)
        self.trained, self.fixed = (
            {name: p.shape for name, p in self.model.named_parameters() if p.requires_grad is flag}
            for flag in (True, False)
        )
        self.buffers = dict(self.model.named_buffers())
        self.groups: list[dict[str, Any]] = [member.optimizer.param_groups[0] for member in members]
        if compiled:
            require_compiler(self.model.device)
        self.flat, self.constants = (
            _stack([[p for p in member.model.parameters() if p.requires_grad is flag] for member in members])
            for flag in (True, False)
        )
        self.average = _stack([member.average for member in members]) if members[0].average else None
        states = [_optimizer_states(member) for member in members]
        self.exp_avg, self.exp_avg_sq, self.steps = (
            _stack([[state[name] for state in each] for each in states]) for name in ("exp_avg", "exp_avg_sq", "step")
        )
        self.done = [int(each[0]["step"]) for each in states]  # on the host too: reading `steps` would wait for the GPU
        self.step: Callable[..., Tensor] = self._compile() if compiled else self._step
        self.captured: dict[int, _CapturedChunk | None] = {}

    def coefficients(
        self, learning_rates: Float64[np.ndarray, "members steps"], decays: Float64[np.ndarray, "members steps"]
    ) -> Float[Tensor, "steps 4 *members"]:
        """Return what changes from step to step, for the next steps: one transfer to the device, not one per step.

        Args:
            learning_rates: of each member, of each step.
            decays: of the moving average, likewise.

        Returns:
            Per step: learning rate over the first bias correction, root of the second, share of the weights that decay
            keeps, decay of the average; each (members, 1) where there are several.
        """
        step = np.array(self.done)[:, None] + np.arange(1, learning_rates.shape[1] + 1)
        beta_1, beta_2 = self.groups[0]["betas"]
        weight_decay = np.array([[group["weight_decay"]] for group in self.groups])
        columns = (
            learning_rates / (1.0 - beta_1**step),
            np.sqrt(1.0 - beta_2**step),
            1.0 - learning_rates * weight_decay,
            decays,
        )
        rows = torch.from_numpy(np.stack(columns, axis=1, dtype=np.float32))  # (members, 4, steps)
        rows = (rows[0].T if self.num_members == 1 else rows.permute(2, 1, 0).unsqueeze(-1)).contiguous()
        device = self.flat.device
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)

    @torch.no_grad()
    def __call__(
        self, coefficients: Float[Tensor, "steps 4 *members"], chunk: Chunk
    ) -> Float[Tensor, "steps *members"]:
        """Take one step per batch of a chunk.

        Args:
            coefficients: from `coefficients`.
            chunk: context, target and noise, each (steps, [members,] batch, columns).

        Returns:
            The losses, on the device.
        """
        inputs = (coefficients, *(values.contiguous() for values in chunk))
        captured = self._captured(inputs) if self.flat.is_cuda else None
        losses = captured(inputs) if captured else self._run(inputs)
        self.steps += len(coefficients)
        self.done = [done + len(coefficients) for done in self.done]
        return losses

    def _run(self, inputs: Chunk) -> Tensor:
        return torch.stack([self.step(*each) for each in zip(*inputs, strict=True)])

    def _captured(self, inputs: Chunk) -> _CapturedChunk | None:
        """Return the CUDA graph of chunks of this length: none the first time, when the step is compiled by running."""
        steps = len(inputs[0])
        if steps not in self.captured:
            self.captured[steps] = None
        elif self.captured[steps] is None:
            self.captured[steps] = _CapturedChunk(self._run, inputs)
        return self.captured[steps]

    def _compile(self) -> Callable[..., Tensor]:
        compiled: Callable[..., Tensor] = torch.compile(
            _with_own_code(self._step),
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        return compiled

    def _step(self, coefficients: Tensor, *batch: Tensor) -> Tensor:
        gradient: Tensor
        losses: Tensor
        gradient, (_, losses) = grad_and_value(self._losses, has_aux=True)(self.flat, self.constants, *batch)
        if self.max_grad_norm is not None:
            norm = gradient.norm(dim=-1, keepdim=True)
            gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        rate, sqrt_correction_2, kept, decay = coefficients.unbind()
        beta_1, beta_2 = self.groups[0]["betas"]
        self.exp_avg.lerp_(gradient, 1.0 - beta_1)
        self.exp_avg_sq.mul_(beta_2).addcmul_(gradient, gradient, value=1.0 - beta_2)
        scale = self.exp_avg_sq.sqrt() / sqrt_correction_2 + self.groups[0]["eps"]
        self.flat.copy_(self.flat * kept - rate * self.exp_avg / scale)
        if self.average is not None:
            self.average.lerp_(self.flat, 1.0 - decay)
        return losses

    def _losses(self, flat: Flat, constants: Flat, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the members' losses, whose gradient is that of each by itself, and the losses."""
        if self.num_members == 1:
            loss = self._loss(flat, constants, *batch)
            return loss, loss.detach()
        losses: Tensor = vmap(self._loss)(flat, constants, *batch)
        return losses.sum(), losses.detach()

    def _loss(self, flat: Tensor, constants: Tensor, context: Tensor, target: Tensor, *noise: Tensor) -> Tensor:
        parameters = {**_pieces(flat, self.trained), **_pieces(constants, self.fixed)}
        with autocast(flat.device, self.precision):
            loss: Tensor = functional_call(self.model, (parameters, self.buffers), (context, target, *noise))
        return loss


class _CapturedChunk:
    """All steps of a chunk as one CUDA graph: the host launches once, and copies the inputs into place before.

    Args:
        run: takes the steps; capturing it records its kernels and runs none.
        inputs: of the shapes to come.
    """

    def __init__(self, run: Callable[[Chunk], Tensor], inputs: Chunk):
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = run(self.inputs)

    def __call__(self, inputs: Chunk) -> Tensor:
        for place, values in zip(self.inputs, inputs, strict=True):
            place.copy_(values, non_blocking=True)
        self.graph.replay()
        return self.losses.clone()


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which products are computed in `precision`; it does nothing for float32."""
    enabled = precision != torch.float32
    return torch.autocast(device.type, dtype=precision if enabled else torch.bfloat16, enabled=enabled)


def require_compiler(device: torch.device) -> None:
    """Check that code for the device can be compiled.

    Raises:
        ConfigError: on a CPU, when there is no C++ compiler.
    """
    if not has_compiler(device):
        raise ConfigError(f"compiled code needs a C++ compiler: {_compiler()} not found; install it or set CXX")


def has_compiler(device: torch.device) -> bool:
    """Return whether code for the device can be compiled: a GPU's compiler comes with torch."""
    return device.type != "cpu" or shutil.which(_compiler()) is not None


def _compiler() -> str:
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _with_own_code(method: Any) -> Any:
    """Return the method with a code object of its own.

    torch.compile keeps its graphs by code object: without guards, a second model in the process would get the first
    one's graph.
    """
    function = method.__func__
    copied = types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    return types.MethodType(copied, method.__self__)


def _pieces(vector: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return views of a vector by name."""
    pieces = vector.split([shape.numel() for shape in shapes.values()]) if shapes else ()
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _stack(rows: Sequence[Sequence[Tensor]]) -> Flat:
    """Move the tensors of each row into one vector and make each tensor a view of it; one row gives no matrix."""
    if not rows[0]:
        return torch.empty(0) if len(rows) == 1 else torch.empty(len(rows), 0)
    flat = torch.stack([torch.cat([tensor.detach().reshape(-1) for tensor in row]) for row in rows])
    for row, vector in zip(rows, flat, strict=True):
        for tensor, piece in zip(row, vector.split([tensor.numel() for tensor in row]), strict=True):
            tensor.data = piece.view(tensor.shape)
    return flat[0] if len(rows) == 1 else flat


def _optimizer_states(member: Member) -> list[dict[str, Tensor]]:
    """Return the optimizer's state of each parameter; created where no step has been taken yet."""
    parameters = [parameter for parameter in member.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        state = member.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    return [member.optimizer.state[parameter] for parameter in parameters]
