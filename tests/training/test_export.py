"""An exported program gives the actions of the library's `sample`, without the library."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from invdyn.errors import ConfigError
from invdyn.models import FlowInverseDynamics, InverseDynamics, LinearInverse, MLPRegression
from invdyn.models.constant_dims import WithConstantDims
from invdyn.models.fitted import FittedModel
from invdyn.models.flow import SamplingSetting
from invdyn.models.gradient_boosted_trees import GradientBoostedTrees
from invdyn.models.mixture_density import GaussianRegression, MixtureDensity
from invdyn.models.nearest_neighbours import NearestNeighbours
from invdyn.statistics import Moments
from invdyn.training import export
from invdyn.training.export import EXAMPLE_SAMPLES, describe_program, export_model
from tests.training.test_compiled import compiles

pytestmark = pytest.mark.usefixtures("without_shape_checks")

STATE_DIM, ACTION_DIM = 4, 1
SIZES = [(5, 8), (1, 1), (1, 3), (7, 1), (300, 2)]
Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def fitted(model: InverseDynamics) -> InverseDynamics:
    """Give a model the normalisation of states far from zero whose steps are small: float32 would lose them."""
    random = np.random.default_rng(0)
    state = 50.0 + random.normal(size=(400, (model.history + 1) * model.state_dim))
    shape = (400, model.horizon, model.action_dim) if model.horizon > 1 else (400, model.action_dim)
    action = random.normal(size=shape)
    after = state[:, -model.state_dim :] + 1e-3 * (action.reshape(400, -1)[:, :1] + random.normal(size=(400, 1)))
    model.fit_normalization(Moments.of_transitions(*(v.astype(np.float32) for v in (state, action, after))))
    return model.eval()


def fitted_to_rows(model: FittedModel) -> InverseDynamics:
    fitted(model)
    generator = torch.Generator().manual_seed(0)
    model.fit(*(torch.randn(200, dim, generator=generator) for dim in (model.context_dim, model.target_dim)))
    return model


def flow(**options: object) -> InverseDynamics:
    torch.manual_seed(0)
    values = {"network": "mlp", "prediction": "target", "num_inference_steps": 3, "down_dims": (8, 8), **options}
    return fitted(FlowInverseDynamics(STATE_DIM, ACTION_DIM, 4, **values))  # type: ignore[arg-type]


def on_gated_base(**options: object) -> InverseDynamics:
    """The parts of the default recipe."""
    base = {"base": "mlp", "base_dims": (8, 8), "base_gates": 4, "base_tails": 1.0}
    return flow(prediction="angular", **base, **options)


def inputs(model: InverseDynamics, batch: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    state = 50.0 + torch.randn(batch, (model.history + 1) * model.state_dim, generator=generator)
    after = state[:, -model.state_dim :] + 1e-3 * torch.randn(batch, model.state_dim, generator=generator)
    return state, after, torch.randn(samples, batch, model.noise_dim, generator=generator)


def assert_same_actions(program: Program, model: InverseDynamics) -> None:
    """For any size; the noise is what `sample` draws from a generator."""
    for batch, samples in SIZES:
        state, after, _ = inputs(model, batch, samples)
        noise = torch.randn(samples, batch, model.noise_dim, generator=torch.Generator().manual_seed(1))
        expected = model.sample(state, after, samples, generator=torch.Generator().manual_seed(1))
        found = program(state, after, noise)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * (1 + float(expected.abs().max())))


MODELS: dict[str, Callable[[], InverseDynamics]] = {
    "mlp flow": flow,
    "unet flow": lambda: flow(network="unet", prediction="velocity", down_dims=(4, 6), solver="midpoint"),
    "gated base": on_gated_base,
    "windows": lambda: flow(history=1, horizon=2),
    "reference": lambda: flow(network="unet", base="none", normalize=False, down_dims=(4,)),
    "regression": lambda: fitted(MLPRegression(STATE_DIM, ACTION_DIM, (8,))),
    "linear": lambda: fitted(LinearInverse(STATE_DIM, ACTION_DIM)),
    "Gaussian": lambda: fitted(GaussianRegression(STATE_DIM, 2, (8,))),
    "diagonal Gaussian": lambda: fitted(GaussianRegression(STATE_DIM, ACTION_DIM, (8,), covariance="diagonal")),
    "mixture": lambda: fitted(MixtureDensity(STATE_DIM, 2, 3, (8,))),
    "mixture of one action": lambda: fitted(MixtureDensity(STATE_DIM, ACTION_DIM, 3, (8,))),
    "neighbours": lambda: fitted_to_rows(NearestNeighbours(STATE_DIM, ACTION_DIM)),
    "trees": lambda: fitted_to_rows(GradientBoostedTrees(STATE_DIM, 2, max_iter=5)),
    "constant dimensions": lambda: WithConstantDims(flow(), [(1, 5.0)], [(1, 0.25)]).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_torch_program(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    path = export_model(model, tmp_path / "new/actions.pt2", "torch")
    assert_same_actions(torch.export.load(path).module(), model)
    assert [file.name for file in path.parent.iterdir()] == ["actions.pt2"]


@pytest.mark.parametrize(
    "name", ["diagonal Gaussian", "mixture of one action", "neighbours", "trees", "regression", "linear"]
)
def test_the_baselines_in_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = MODELS[name]()
    assert_same_actions(onnx_program(export_model(model, tmp_path / "actions.onnx", "onnx")), model)


@compiles
def test_machine_code(tmp_path: Path) -> None:
    model = on_gated_base(num_inference_steps=1)  # compiling takes its time for each step
    path = export_model(model, tmp_path / "actions.pt2", "aoti")
    assert_same_actions(torch._inductor.aoti_load_package(str(path)), model)
    run_documented_loader(path)


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = on_gated_base()
    path = export_model(model, tmp_path / "actions.onnx", "onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["actions.onnx"]
    assert_same_actions(onnx_program(path), model)


def onnx_program(path: Path) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = ("state", "next_state", "noise")
    assert tuple(each.name for each in session.get_inputs()) == names
    assert [each.name for each in session.get_outputs()] == ["actions"]

    def program(*tensors: Tensor) -> Tensor:
        (actions,) = session.run(None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)})
        return torch.from_numpy(actions)

    return program


def test_the_documented_loader(tmp_path: Path) -> None:
    """In a process that cannot import this project."""
    run_documented_loader(export_model(flow(), tmp_path / "actions.pt2", "torch"))


def run_documented_loader(path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    code = re.search(r"```python\n(import sys.*?)```", page, re.DOTALL)[1]  # type: ignore[index]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    blocked = "import sys\nsys.modules['invdyn'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code, str(path)], cwd=path.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([8, 5, 1])\n"


def test_the_number_of_steps_is_fixed_in_the_file(tmp_path: Path) -> None:
    model = flow()
    path = export_model(model, tmp_path / "one.pt2", "torch", num_inference_steps=1, solver="midpoint")
    program = torch.export.load(path).module()
    state, after, noise = inputs(model, 5, 2)
    expected = model.sample_from(state, after, noise, num_inference_steps=1, solver="midpoint")
    torch.testing.assert_close(program(state, after, noise), expected)
    assert not torch.allclose(program(state, after, noise), model.sample_from(state, after, noise))


def test_calibrated_factors_are_no_constants_of_the_program(tmp_path: Path) -> None:
    """A constant that is made while sampling stays on the CPU, where machine code for a GPU cannot read it."""
    model = flow()
    model.spreads = {SamplingSetting("euler", 3): (1.5,)}  # type: ignore[assignment]
    program = torch.export.load(export_model(model, tmp_path / "a.pt2", "torch"))
    buffers = {f"model.{name}" for name, _ in model.named_buffers()}
    assert set(program.constants) <= buffers
    assert_same_actions(program.module(), model)


def test_what_the_program_takes() -> None:
    inputs, output = describe_program(flow(history=1, horizon=2)).split(" -> ")
    assert inputs == "state (batch, 8), next_state (batch, 4), noise (samples, batch, 2)"
    assert output == "actions (samples, batch, 2, 1), all float32"


class Drawn(LinearInverse):
    """A model that is no map from noise to actions."""

    _targets_from_noise = InverseDynamics._targets_from_noise


class OfOneBatch(LinearInverse):
    """A model whose batch a program cannot leave free."""

    def _targets_from_noise(self, context: Tensor, *_: object) -> Tensor:
        return torch.zeros(EXAMPLE_SAMPLES, len(context), self.target_dim)


@pytest.mark.parametrize(
    ("name", "file_format", "message"),
    [
        ("a.pt2", "tensorrt", r"format must be one of torch, aoti, onnx, got 'tensorrt'"),
        ("a.pt", "torch", r"a file of format torch must end in \.pt2, got a\.pt"),
        ("a.pt2", "onnx", r"a file of format onnx must end in \.onnx, got a\.pt2"),
        ("file/a.pt2", "torch", r"cannot write .*file/a\.pt2: .*; give another --output"),
        ("/proc/a.pt2", "torch", r"cannot write /proc/a\.pt2: .*; give another --output"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, file_format: str, message: str) -> None:
    (tmp_path / "file").touch()
    """It is found before the model is traced, which takes time, and here fails."""
    with pytest.raises(ConfigError, match=message):
        export_model(fitted(OfOneBatch(2, 1)), tmp_path / name, file_format)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Drawn(2, 1), r"the model must be a map from noise to actions .*, Drawn is none"),
        (OfOneBatch(2, 1), r"the model must be one that torch.export can trace with any batch, OfOneBatch is none: .*"),
    ],
)
def test_a_model_that_cannot_be_exported(tmp_path: Path, model: InverseDynamics, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_model(fitted(model), tmp_path / "a.pt2", "torch")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_whole(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = flow()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*a\.pt2: File too large"):
            export_model(model, tmp_path / "a.pt2", "torch")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.pt2").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*a\.pt2: it is a folder; give another --output"):
        export_model(fitted(OfOneBatch(2, 1)), tmp_path / "a.pt2", "torch")


@pytest.mark.parametrize("name", ["Gaussian", "mixture"])
def test_onnx_cannot_solve_for_a_full_covariance(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(
        ConfigError, match=r"^format onnx must be able to hold the model, \w+ did not fit: .*triangular"
    ):
        export_model(MODELS[name](), tmp_path / "a.onnx", "onnx")


def test_missing_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        export_model(flow(), tmp_path / "a.pt2", "aoti")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"format onnx needs onnx and onnxscript: pip install 'invdyn\[export\]'"):
        export_model(flow(), tmp_path / "a.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


@compiles
@pytest.mark.slow
def test_machine_code_of_a_unet(tmp_path: Path) -> None:
    model = MODELS["unet flow"]()
    path = export_model(model, tmp_path / "actions.pt2", "aoti")
    assert zipfile.is_zipfile(path)
    assert_same_actions(torch._inductor.aoti_load_package(str(path)), model)
