"""Export a model as one program: (state, next_state, noise) in physical units to actions, with any batch size.

Normalisation (its differences in float64), linear base, all solver steps and decoding are inside. The program runs
where only torch is (`torch`), as machine code without a compiler or Python overhead (`aoti`), or without torch at all
(`onnx`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from invdyn import storage
from invdyn.config import nearest
from invdyn.errors import ConfigError
from invdyn.models.base import InverseDynamics
from invdyn.training.compiled import require_compiler

# Neither 0 nor 1, which would be taken for constants, and no two alike.
EXAMPLE_ROWS, EXAMPLE_SAMPLES = 6, 3
INPUTS = ("state", "next_state", "noise")
OUTPUT = "actions"


class ActionProgram(nn.Module):
    """`sample_from` of a model with its solver and number of steps fixed.

    Args:
        model: a flow, or a model that predicts a point.
        num_inference_steps: solver steps; None for the model's own number.
        solver: None for the model's own.
    """

    def __init__(self, model: InverseDynamics, num_inference_steps: int | None = None, solver: str | None = None):
        super().__init__()
        self.model = model
        self.num_inference_steps, self.solver = num_inference_steps, solver

    def forward(
        self,
        state: Float[Tensor, "batch window_dim"],
        next_state: Float[Tensor, "batch state_dim"],
        noise: Float[Tensor, "samples batch noise"],
    ) -> Float[Tensor, "samples batch *horizon action_dim"]:
        """Return the actions that noise becomes; shapes as in `InverseDynamics.sample_from`."""
        return self.model.sample_from(
            state, next_state, noise, num_inference_steps=self.num_inference_steps, solver=self.solver
        )

    def example(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs of the right widths, on the model's device."""
        model = self.model
        return (
            torch.randn(EXAMPLE_ROWS, (model.history + 1) * model.state_dim, device=model.device),
            torch.randn(EXAMPLE_ROWS, model.state_dim, device=model.device),
            torch.randn(EXAMPLE_SAMPLES, EXAMPLE_ROWS, model.noise_dim, device=model.device),
        )


def export_model(
    model: InverseDynamics,
    path: str | Path,
    file_format: str,
    *,
    num_inference_steps: int | None = None,
    solver: str | None = None,
) -> Path:
    """Write a model's program to a file, which is whole or absent.

    Args:
        model: in eval mode; the program stays on its device.
        path: of the file; its ending must be the format's.
        file_format: torch, aoti or onnx.
        num_inference_steps: solver steps; None for the model's own number.
        solver: None for the model's own.

    Returns:
        The path.

    Raises:
        ConfigError: for an unknown format, another ending, a model that cannot be exported, a file that cannot be
            written, or when what the format needs (a compiler, packages) is missing.
    """
    if file_format not in FORMATS:
        raise ConfigError(
            f"format must be one of {', '.join(FORMATS)}, got {file_format!r}; {nearest(file_format, FORMATS)}"
        )
    path = Path(path)
    ending, save = FORMATS[file_format]
    if path.suffix != ending:
        raise ConfigError(f"a file of format {file_format} must end in {ending}, got {path.name}")
    _check_tools(file_format, model.device)
    program = ActionProgram(model, num_inference_steps, solver).eval().requires_grad_(False)
    with torch.no_grad():
        program(*program.example())  # what cannot be exported says so in words of its own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with storage.renaming(path) as temporary:
            temporary.touch()  # exporting takes up to minutes: what cannot be written is found before
            save(trace(program), temporary)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; give another --output") from None
    except RuntimeError as error:  # of the compilers and converters
        raise ConfigError(
            f"format {file_format} must be able to hold the model, {_name(model)} did not fit: "
            f"{_short(error.__cause__ or error)}; give another --format"
        ) from None
    return path


def trace(program: ActionProgram) -> ExportedProgram:
    """Return a program whose batch and number of samples are free.

    Raises:
        ConfigError: when the model cannot be traced, or not with any batch.
    """
    batch, samples = Dim("batch"), Dim("samples")
    shapes = {"state": {0: batch}, "next_state": {0: batch}, "noise": {0: samples, 1: batch}}
    try:
        with torch.no_grad():
            return torch.export.export(program, program.example(), dynamic_shapes=shapes)
    except RuntimeError as error:  # torch's UserError is one
        raise ConfigError(
            f"the model must be one that torch.export can trace with any batch, {_name(program.model)} is none: "
            f"{_short(error)}; use `sample`"
        ) from None


def describe_program(model: InverseDynamics) -> str:
    """Return the program's inputs and output, with their shapes."""
    window_dim = (model.history + 1) * model.state_dim
    shape = ", ".join(str(size) for size in model.action_shape)
    return (
        f"state (batch, {window_dim}), next_state (batch, {model.state_dim}), "
        f"noise (samples, batch, {model.noise_dim}) -> actions (samples, batch, {shape}), all float32"
    )


def _name(model: InverseDynamics) -> str:
    return type(getattr(model, "inner", model)).__name__


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _check_tools(file_format: str, device: torch.device) -> None:
    if file_format == "aoti":
        require_compiler(device)
    if file_format == "onnx" and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise ConfigError(f"format onnx needs {' and '.join(missing)}: pip install 'invdyn[export]'")


def _save_torch(program: ExportedProgram, path: Path) -> None:
    # By way of the memory: torch's own writer of files ends the process on a disk that is full.
    packed = io.BytesIO()
    torch.export.save(program, packed)
    path.write_bytes(packed.getbuffer())


def _save_aoti(program: ExportedProgram, path: Path) -> None:
    packed = io.BytesIO()
    torch._inductor.aoti_compile_and_package(program, package_path=packed)
    path.write_bytes(packed.getbuffer())


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    torch.onnx.export(
        program, (), str(path), input_names=INPUTS, output_names=(OUTPUT,), external_data=False, verbose=False
    )


FORMATS: dict[str, tuple[str, Callable[[ExportedProgram, Path], None]]] = {
    "torch": (".pt2", _save_torch),
    "aoti": (".pt2", _save_aoti),
    "onnx": (".onnx", _save_onnx),
}
