"""The command around `invdyn.training.export`, which has tests of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from invdyn.training.checkpoint import load_model
from invdyn.training.loop import train_loop
from tests.training.runs import CPU, make_dataset, run_config

RunHere = Callable[..., int]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    train_loop(run_config(make_dataset(folder), folder / "run", num_epochs=1), CPU)
    return folder / "run"


@pytest.fixture
def main(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_cwd: Path) -> Iterator[RunHere]:
    """Run the command in this process and an empty folder; return its exit code."""
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    script, common = importlib.import_module("export"), importlib.import_module("common")
    jaxtyping.config.update("jaxtyping_disable", True)  # the shape checks of the test session cannot be exported

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        try:
            common.run_command(script.main)
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    yield run
    jaxtyping.config.update("jaxtyping_disable", False)
    sys.modules.pop("export", None)


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--format", "tensorrt", "--output", "a.pt2"),
            "error: format must be one of torch, aoti, onnx, got",
        ),
        (("--format", "torch", "--output", "a.onnx"), "error: a file of format torch must end in .pt2, got a.onnx"),
        (("--format", "torch", "--output", "a.pt2", "--solver", "heun"), "error: solver must be one of "),
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
    assert errors.startswith(message)
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
