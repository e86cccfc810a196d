"""The command around `invdyn.training.export`, which has tests of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from invdyn.training.checkpoint import load_model
from invdyn.training.loop import train_loop
from tests.experiments.conftest import RunHere
from tests.training.runs import CPU, make_dataset, run_config
from tests.training.test_loop import Stopped, stop_at


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    train_loop(run_config(make_dataset(folder), folder / "run", num_epochs=1), CPU)
    return folder / "run"


@pytest.fixture
def main(command: Callable[..., RunHere], without_shape_checks: None) -> RunHere:
    return command("export")


def test_export(main: RunHere, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--format", "torch", "--output", "out/actions.pt2", "--num_inference_steps", 1)
    assert main("--checkpoint", run_dir, *flags) == 0
    takes, where = capsys.readouterr().out.splitlines()
    assert takes.startswith("state (batch, 2), next_state (batch, 2), noise (samples, batch, 1) -> actions ")
    assert where == "program: out/actions.pt2"
    state, after = torch.randn(2, 9, 2)
    noise = torch.randn(3, 9, 1)
    program = torch.export.load(tmp_path / "out/actions.pt2").module()
    expected = load_model(run_dir).sample_from(state, after, noise, num_inference_steps=1)
    torch.testing.assert_close(program(state, after, noise), expected)


def test_steps_that_were_not_validated(main: RunHere, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--checkpoint", run_dir, "--format", "torch", "--output", "a.pt2")
    assert main(*flags) == 0
    assert capsys.readouterr().err == ""
    assert main(*flags, "--num_inference_steps", 3) == 0
    assert capsys.readouterr().err == (
        "warning: The checkpoint was not validated with this solver and number of steps: `sample` refuses them.\n"
    )


def test_a_run_that_did_not_end(main: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_dataset(tmp_path)
    with pytest.raises(Stopped):
        train_loop(run_config(store, tmp_path / "cut", num_epochs=4, checkpoints=4), stop_at(3))
    assert main("--checkpoint", tmp_path / "cut", "--format", "torch", "--output", "a.pt2") == 0
    assert capsys.readouterr().err == "warning: The checkpoint is unfinished: epoch 3 of 4.\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--format", "tensorrt", "--output", "a.pt2"),
            "error: format must be one of torch, aoti, onnx, got",
        ),
        (("--format", "torch", "--output", "a.onnx"), "error: a file of format torch must end in .pt2, got a.onnx"),
        (("--format", "torch", "--output", "a.pt2", "--solver", "heun"), "error: solver must be one of "),
        (("--format", "torch", "--output", "a.pt2", "--device", "gpu"), "must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (("--format", "torch", "--output", "a.pt2", "--checkpoint", "nowhere"), "error: checkpoint not found: nowhere"),
    ],
)
def test_bad_input(
    main: RunHere,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert main("--checkpoint", run_dir, *flags) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.splitlines()[-1].startswith(("error: ", "export.py: error: "))
    assert list(tmp_path.iterdir()) == []
