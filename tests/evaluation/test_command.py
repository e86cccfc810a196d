from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from invdyn.evaluation.evaluate import linear_baseline
from invdyn.models.flow import FlowInverseDynamics
from invdyn.models.registry import parse_model_config
from invdyn.training.checkpoint import save_checkpoint
from invdyn.training.run_config import RunConfig
from invdyn.transitions.store import TransitionStore
from tests.evaluation.pendulum import extract

MODEL = {
    "name": "tiny",
    "_target_": "invdyn.models.FlowInverseDynamics",
    "network": "mlp",
    "down_dims": [8],
    "num_inference_steps": 2,
}


@pytest.fixture(scope="module")
def run_dir(store: TransitionStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only checkpoint is an untrained flow."""
    path = tmp_path_factory.mktemp("run")
    model_config = parse_model_config(MODEL, where="test")
    config = RunConfig(
        dataset_name="pendulum",
        dataset_path=str(store.path),
        dataset_hash=store.content_hash,
        state_dim=4,
        action_dim=1,
        model=model_config,
        training=model_config.training,
        run_dir=str(path),
    )
    torch.manual_seed(0)
    model = model_config.build(4, 1, 0, 1)
    assert isinstance(model, FlowInverseDynamics)
    model.fit_normalization(store.moments)
    save_checkpoint(path, config, 7, model.state_dict(), {"step": 7}, {"val_loss": 0.5})
    return path


def run_evaluate(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "experiments/evaluate.py", "--baselines", "linear", "--smoke", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=200)


def test_it_prints_a_table_and_ends_with_the_report(repository: Path, run_dir: Path, store: TransitionStore) -> None:
    done = run_evaluate(repository, "--checkpoint", str(run_dir), "--step_counts", "1,3", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"report: {run_dir / 'evaluation' / 'report.html'}"
    assert [line.split()[:2] for line in lines[2:6]] == [["tiny", "1"], ["tiny", "2"], ["tiny", "3"], ["linear", "-"]]
    values = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    expected = linear_baseline(store)
    assert values["sections"]["Dataset"]["content hash"] == store.content_hash
    assert values["sections"]["Checkpoint"]["val_loss"] == 0.5
    assert values["results"][-1]["one_sample"]["nrmse"] == pytest.approx(linear_error(expected, store), rel=1e-5)
    assert values["num_rows"] == store.num_rows("test")


def linear_error(model: torch.nn.Module, store: TransitionStore) -> float:
    rows = {name: torch.from_numpy(values) for name, values in store.load("test").items()}
    error = model.sample(rows["state"], rows["next_state"])[0].double() - rows["action"]  # type: ignore[operator]
    return float(error.square().mean().sqrt()) / float(store.moments.std[-1])


def test_a_dataset_of_other_dimensions_is_refused(
    repository: Path, run_dir: Path, recording: Path, tmp_path: Path
) -> None:
    other = extract(recording, history=1)
    values = {"name": "other", "buffer_path": str(recording), "output_path": str(other.path), "history": 1}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    output = tmp_path / "output"
    done = run_evaluate(
        repository,
        *("--checkpoint", str(run_dir), "--dataset_config", str(tmp_path / "other.yaml"), "--output", str(output)),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "must have the same dimensions" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not output.exists()


def test_a_dataset_of_other_rows_is_named_as_such(
    repository: Path, run_dir: Path, recording: Path, tmp_path: Path
) -> None:
    other = extract(recording, test_ratio=0.4)
    values = {"name": "other", "buffer_path": str(recording), "output_path": str(other.path)}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    arguments = ("--checkpoint", str(run_dir), "--dataset_config", str(tmp_path / "other.yaml"))
    done = run_evaluate(repository, *arguments, "--output", str(tmp_path / "output"))
    assert done.returncode == 0, done.stderr
    assert "trained on other rows" in done.stdout
    assert "trained on other rows" in (tmp_path / "output" / "report.html").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_refused(repository: Path, run_dir: Path) -> None:
    done = run_evaluate(repository, "--checkpoint", str(run_dir), "--device", "cuda")
    assert done.returncode == 2
    assert "cuda" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_checkpoint_ends_with_code_2(repository: Path, tmp_path: Path) -> None:
    done = run_evaluate(repository, "--checkpoint", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "checkpoint not found" in done.stderr


@pytest.mark.parametrize(("flag", "value"), [("--step_counts", "1,0"), ("--baselines", "liner"), ("--split", "tset")])
def test_a_bad_flag_is_named(
    repository: Path, flag: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "x", flag, value])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(repository / "experiments" / "evaluate.py"), run_name="__main__")
    assert exit_info.value.code == 2
    assert flag in capsys.readouterr().err
