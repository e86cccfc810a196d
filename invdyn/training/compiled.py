"""The training step as one compiled graph: forward, backward, AdamW and the moving average on flat vectors.

An eager step of a small network spends most of its time between kernels. Here all parameters are views of one vector,
so that the whole step is a single call into generated code. The model's own parameters and the optimizer's own state
stay views of the same memory: checkpoints do not know the difference.
"""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, grad_and_value

from invdyn.errors import ConfigError
from invdyn.models.base import InverseDynamics, Noise

Flat = Float[Tensor, "parameters"]


class CompiledStep:
    """One AdamW step per call. Needs a C++ compiler on a CPU, Triton on a GPU.

    The batch shape must not change between calls: guards, which would cost a tenth of a small step, are left out.

    Args:
        model: trained in place.
        optimizer: an AdamW over the model's parameters; its state is read now and kept up to date.
        average: parameters of the moving average, kept up to date; empty for none.
        max_grad_norm: as in the recipe.

    Raises:
        ConfigError: on a CPU, when there is no C++ compiler.
    """

    def __init__(
        self,
        model: InverseDynamics,
        optimizer: torch.optim.AdamW,
        average: Sequence[Tensor],
        max_grad_norm: float | None,
    ):
        require_compiler(model.device)
        self.model, self.max_grad_norm = model, max_grad_norm
        self.names = [name for name, _ in model.named_parameters()]
        parameters = [parameter for _, parameter in model.named_parameters()]
        self.shapes = [parameter.shape for parameter in parameters]
        self.buffers = dict(model.named_buffers())
        self.group: dict[str, Any] = optimizer.param_groups[0]
        self.flat = _flatten(parameters)
        self.average = _flatten(average) if average else None
        self.steps, self.exp_avg, self.exp_avg_sq = _flatten_state(optimizer, parameters)
        self.compiled: Callable[..., Tensor] = torch.compile(
            _with_own_code(self._step),
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )

    def coefficients(self, learning_rates: Sequence[float], decays: Sequence[float]) -> Float[Tensor, "steps 4"]:
        """Return what changes from step to step, for the next steps: one transfer to the device, not one per step.

        Args:
            learning_rates: of each step.
            decays: of the moving average at each step.
        """
        beta_1, beta_2 = self.group["betas"]
        first = int(self.steps[0]) + 1
        rows = [
            (rate, 1.0 - beta_1 ** (first + i), (1.0 - beta_2 ** (first + i)) ** 0.5, decay)
            for i, (rate, decay) in enumerate(zip(learning_rates, decays, strict=True))
        ]
        return torch.tensor(rows, device=self.flat.device)

    @torch.no_grad()
    def __call__(
        self,
        coefficients: Float[Tensor, "4"],
        context: Float[Tensor, "batch context"],
        target: Float[Tensor, "batch target"],
        noise: Noise,
    ) -> Float[Tensor, ""]:
        """Take one step and return its loss, still on the device."""
        return self.compiled(coefficients, context, target, *noise)

    def advance(self, steps: int) -> None:
        """Count finished steps in the optimizer's state."""
        torch._foreach_add_(self.steps, steps)

    def _step(self, coefficients: Tensor, context: Tensor, target: Tensor, *noise: Tensor) -> Tensor:
        gradient: Tensor
        loss: Tensor
        gradient, loss = grad_and_value(self._loss)(self.flat, context, target, *noise)
        if self.max_grad_norm is not None:
            gradient = gradient * (self.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
        rate, correction_1, sqrt_correction_2, decay = coefficients.unbind()
        beta_1, beta_2 = self.group["betas"]
        self.exp_avg.lerp_(gradient, 1.0 - beta_1)
        self.exp_avg_sq.mul_(beta_2).addcmul_(gradient, gradient, value=1.0 - beta_2)
        scale = self.exp_avg_sq.sqrt() / sqrt_correction_2 + self.group["eps"]
        kept = self.flat * (1.0 - rate * self.group["weight_decay"])
        self.flat.copy_(kept - rate / correction_1 * self.exp_avg / scale)
        if self.average is not None:
            self.average.lerp_(self.flat, 1.0 - decay)
        return loss

    def _loss(self, flat: Flat, context: Tensor, target: Tensor, *noise: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in self.shapes])
        parameters = {n: p.view(shape) for n, p, shape in zip(self.names, pieces, self.shapes, strict=True)}
        loss: Tensor = functional_call(self.model, (parameters, self.buffers), (context, target, *noise))
        return loss


def require_compiler(device: torch.device) -> None:
    """Check that code for the device can be compiled.

    Raises:
        ConfigError: on a CPU, when there is no C++ compiler.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise ConfigError(f"a compiled step needs a C++ compiler: {name} not found; install it or set CXX")


def _with_own_code(method: Any) -> Any:
    """Return the method with a code object of its own.

    torch.compile keeps its graphs by code object: without guards, a second model in the process would get the first
    one's graph.
    """
    function = method.__func__
    copied = types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    return types.MethodType(copied, method.__self__)


def _flatten(tensors: Sequence[Tensor]) -> Flat:
    """Move tensors into one vector and make each a view of it."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = piece.view(tensor.shape)
    return flat


def _flatten_state(optimizer: torch.optim.AdamW, parameters: Sequence[Tensor]) -> tuple[list[Tensor], Flat, Flat]:
    """Move the optimizer's moments into vectors; create them where no step has been taken yet."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    states = [optimizer.state[parameter] for parameter in parameters]
    exp_avg, exp_avg_sq = (_flatten([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
    return [state["step"] for state in states], exp_avg, exp_avg_sq
