from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from invdyn.training.checkpoint import list_checkpoints, load_checkpoint
from invdyn.training.run_config import RunConfig
from invdyn.transitions.store import TransitionStore
from tests.experiments.conftest import RunHere
from tests.training.runs import FLOW, RECIPE, dataset_config, make_dataset

SWEEP = {
    "name": "small",
    "dataset_config": "dataset.yaml",
    "model_config": "model.yaml",
    "space": {"down_dims": [[8], [8, 8], [16, 16]], "num_inference_steps": [1, 2]},
    "num_epochs": 2,
}
MEASURED = ("us_per_action", "train_s", "run_dir")
TIMEOUT_S = 120


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and its configs, shared by all tests: none may write into it."""
    folder = tmp_path_factory.mktemp("sweep")
    make_dataset(folder)
    dataset = dataset_config(folder).model_dump(mode="json", exclude_none=True)
    write(folder / "dataset.yaml", dataset)
    write(folder / "no_val.yaml", {**dataset, "output_path": str(make_dataset(folder / "no", val_ratio=0.0).path)})
    write(folder / "model.yaml", {**FLOW, "training": RECIPE})
    write(folder / "sweep.yaml", with_paths(folder))
    return folder


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values))


def with_paths(folder: Path, **values: Any) -> dict[str, Any]:
    paths = {name: str(folder / str(SWEEP[name])) for name in ("dataset_config", "model_config")}
    return {**SWEEP, **paths, **values}


@pytest.fixture
def main(command: Callable[..., RunHere]) -> RunHere:
    return command("sweep", "--wandb", "disabled")


def start(repository: Path, cwd: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(repository / "experiments/sweep.py"), "--wandb", "disabled", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not list(folder.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def results(folder: Path) -> list[dict[str, str]]:
    """Return the rows of results.csv without what is measured."""
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return [{name: row[name] for name in row if name not in MEASURED} for row in csv.DictReader(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_sweep(main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--config", recorded / "sweep.yaml", "--local", "--output", "out", "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0].startswith(f"local: one process on this machine, {os.cpu_count()} CPUs, ")
    assert captured.err.splitlines()[0].endswith(" GPUs; uses cpu")
    lines = captured.out.splitlines()
    assert lines[0].startswith("3 networks x 2 step counts on TransitionStore(")
    assert lines[-3:] == [
        f"results: {tmp_path / 'out/results.csv'}",
        f"best model: {tmp_path / 'out/best'}",
        f"plot: {tmp_path / 'out/quality_against_cost.png'}",
    ]
    table = lines[2:-3]
    rows = results(tmp_path / "out")
    assert len(table) == len(rows) == 6
    assert [float(line.split()[0]) for line in table] == [float(f"{float(row['val_nrmse']):.4g}") for row in rows]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("best", "quality_against_cost.png", "results.csv", "sweep.yaml", "trials")
    ]
    best = load_checkpoint(tmp_path / "out/best").config
    assert best.training.num_epochs == 2
    assert best.model.to_values()["num_inference_steps"] == int(rows[0]["num_inference_steps"])
    assert best.tracking.group == "out"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_smoke_from_an_empty_folder(
    main: RunHere, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No flag but these: the default sweep makes its dataset first, a small one."""
    assert main("--smoke", "--local") == 0
    (folder,) = (tmp_path / "runs/sweeps").iterdir()
    assert "the dataset is not there yet, making it first" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs"]
    store = TransitionStore(tmp_path / "data/inverse_dynamics/pendulum_integrable")
    assert store.num_rows("train") < 10_000
    assert len(list((folder / "trials").iterdir())) == 2
    assert {row["epochs"] for row in results(folder)} == {"2"}
    load_checkpoint(folder / "best")
    default = yaml.safe_load((repository / "configs/sweep/pendulum.yaml").read_text())
    assert len(results(folder)) == 2 * len(default["space"]["num_inference_steps"])


@pytest.mark.parametrize(("others", "networks"), [({}, 1), ({"down_dims": [[4], [8]]}, 2)])
def test_smoke_replaces_the_epochs_of_the_space(
    main: RunHere, recorded: Path, tmp_path: Path, others: dict[str, Any], networks: int
) -> None:
    space = {"training.num_epochs": [50, 100], **others}
    write(tmp_path / "epochs.yaml", with_paths(recorded, space=space, num_epochs=None))
    assert main("--config", "epochs.yaml", "--local", "--smoke", "--output", "out") == 0
    assert [row["epochs"] for row in results(tmp_path / "out")] == ["2"] * networks


def test_killed_then_resumed_equals_an_uninterrupted_sweep(
    main: RunHere, repository: Path, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", recorded / "sweep.yaml", "--local", "--set", "num_epochs=40"]
    process = start(repository, tmp_path, *flags, "--output", "killed")
    wait_for("trials/001-*/checkpoints/step-*", tmp_path / "killed", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL
    done = [path.parent.name for path in (tmp_path / "killed").glob("trials/*/quality.json")]
    assert len(done) == 1
    assert not (tmp_path / "killed/best").exists()
    before = contents(tmp_path / "killed/trials" / done[0])
    assert main("--resume", "killed", "--local") == 0
    line = "command was cut off: 1 trials are kept, 1 go on from their latest checkpoints"
    assert line in capsys.readouterr().err
    assert contents(tmp_path / "killed/trials" / done[0]) == before
    assert main(*flags, "--output", "whole") == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    weights = [(tmp_path / name / "best/model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("where", [["--local"], pytest.param(["--num_workers", 1], marks=pytest.mark.slow)])
def test_ctrl_c_says_how_to_continue(
    main: RunHere, repository: Path, recorded: Path, tmp_path: Path, where: list[object]
) -> None:
    """Tune by itself would take a half-done sweep for a complete one."""
    flags = ["--config", recorded / "sweep.yaml", *where, "--set", "num_epochs=400", "--set", "asha=null"]
    process = start(repository, tmp_path, *flags, "--output", "out")
    wait_for("trials/000-*/checkpoints/step-*", tmp_path / "out", process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == f"interrupted; continue with --resume {tmp_path / 'out'}"
    assert "Traceback" not in errors
    assert not (tmp_path / "out/best").exists()


def test_a_resumed_sweep_may_run_elsewhere(main: RunHere, recorded: Path, tmp_path: Path) -> None:
    """A sweep that has ended is reported again; the config comes from its folder alone."""
    assert main("--config", recorded / "sweep.yaml", "--local", "--output", "out", "--set", "num_epochs=1") == 0
    expected = results(tmp_path / "out")
    (tmp_path / "out/results.csv").unlink()
    assert main("--resume", tmp_path / "out", "--local", "--device", "cpu") == 0
    assert results(tmp_path / "out") == expected
    assert {row["epochs"] for row in expected} == {"1"}


def test_a_setting_reaches_the_run(main: RunHere, recorded: Path, tmp_path: Path) -> None:
    """A recipe value of the space, and one of the sweep itself."""
    space = {"training.learning_rate": [1e-5], "training.batch_size": [32]}
    write(tmp_path / "recipe.yaml", with_paths(recorded, space=space, num_epochs=None, cpus_per_trial=2))
    assert main("--config", "recipe.yaml", "--local", "--output", "out") == 0
    (run_dir,) = (tmp_path / "out/trials").iterdir()
    config = RunConfig.load(list_checkpoints(run_dir)[-1])
    assert (config.training.learning_rate, config.training.batch_size) == (1e-5, 32)
    assert (config.training.num_epochs, config.cpu_threads) == (RECIPE["num_epochs"], 2)
    assert [row["num_inference_steps"] for row in results(tmp_path / "out")] == ["2"]


BAD = {
    "malformed.yaml": "name: [1",
    "unknown_key.yaml": {"num_trial": 3},
    "unknown_space.yaml": {"space": {"down_dim": [[8]]}},
    "bad_value.yaml": {"space": {"down_dims": [[8], [0]]}},
    "bad_steps.yaml": {"space": {"num_inference_steps": [2, "x"]}},
    "repeated.yaml": {"space": {"down_dims": [[8], [8]]}},
    "no_model.yaml": {"model_config": "absent.yaml"},
    "no_dataset.yaml": {"dataset_config": "absent.yaml"},
    "not_recorded.yaml": {"dataset_config": "nothing_there.yaml"},
    "no_validation.yaml": {"dataset_config": "no_val.yaml"},
    "student_of_mlp.yaml": {"model_config": "mlp.yaml", "space": {"training.student_steps": [2]}},
    "steps_of_mlp.yaml": {"model_config": "mlp.yaml", "space": {"num_inference_steps": [1, 2]}},
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "absent.yaml"], "config file not found: absent.yaml"),
        (["--config", "malformed.yaml"], "malformed.yaml is not valid YAML"),
        (["--config", "unknown_key.yaml"], "unknown key 'num_trial'; did you mean 'num_trials'?"),
        (["--config", "unknown_space.yaml"], "space: unknown key 'down_dim'; did you mean 'down_dims'?"),
        (["--config", "bad_value.yaml"], "Input should be greater than 0, got 0"),
        (["--config", "bad_steps.yaml"], "space.num_inference_steps must hold whole numbers above 0"),
        (["--config", "repeated.yaml"], "space.down_dims must not repeat a value"),
        (["--config", "no_model.yaml"], "config file not found: absent.yaml"),
        (["--config", "no_dataset.yaml"], "config file not found: absent.yaml"),
        (["--config", "not_recorded.yaml"], "dataset not found: "),
        (["--config", "no_validation.yaml"], "a sweep needs validation rows"),
        (["--config", "student_of_mlp.yaml"], "training.student_steps needs a flow, got invdyn.models.MLPRegression"),
        (["--config", "steps_of_mlp.yaml"], "space: unknown key 'num_inference_steps'"),
        (["--config", "good.yaml", "--set", "num_epochs=0"], "num_epochs: Input should be greater than 0"),
        (["--config", "good.yaml", "--set", "num_epochs"], "--set takes key.path=value"),
        (["--config", "good.yaml", "--output", "taken"], "sweep folder exists already: "),
        (["--config", "good.yaml", "--output", "taken/file"], "sweep folder exists already: "),
        (["--config", "good.yaml", "--device", "gpu"], "device: String should match pattern"),
        (["--config", "good.yaml", "--device", "cuda:99"], "device 'cuda:99' must exist: this machine has "),
        (["--config", "good.yaml", "--local", "--num_workers", "2"], "--local trains in one process, got --num_wor"),
        (["--resume", "taken"], "config file not found: "),
        (["--resume", "absent"], "config file not found: "),
        (["--resume", "taken", "--config", "good.yaml"], "--resume continues a sweep as it was started; drop"),
        (["--resume", "taken", "--output", "other"], "--resume continues a sweep as it was started; drop"),
        (["--resume", "taken", "--set", "seed=1"], "--resume continues a sweep as it was started; drop"),
        (["--resume", "taken", "--smoke"], "--resume continues a sweep as it was started; drop"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    main: RunHere,
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    for name, values in {**BAD, "good.yaml": {}}.items():
        if isinstance(values, dict):
            write(tmp_path / name, with_paths(recorded, **values))
        else:
            (tmp_path / name).write_text(values)
    write(tmp_path / "nothing_there.yaml", {"name": "nothing", "buffer_path": str(tmp_path / "sequence/nothing")})
    (tmp_path / "no_val.yaml").write_text((recorded / "no_val.yaml").read_text())
    write(tmp_path / "mlp.yaml", {"_target_": "invdyn.models.MLPRegression", "name": "mlp"})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    before = contents(tmp_path)
    assert main("--local", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert contents(tmp_path) == before


def test_networks_are_validated_before_ray_and_the_simulator_start(
    main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in the space must not wait for minutes of recording."""
    monkeypatch.setitem(sys.modules, "ray", None)
    dataset = {"name": "new", "buffer_path": "sequence/new", "collect": {"env_id": "InvertedPendulumIntegrable-v5"}}
    write(tmp_path / "new.yaml", dataset)
    write(tmp_path / "bad.yaml", with_paths(recorded, dataset_config="new.yaml", space={"down_dims": [[8], [-1]]}))
    assert main("--config", "bad.yaml") == 2
    assert "in space: {'down_dims': [-1]}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "new.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_gpus_on_ray(
    main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    assert main("--config", recorded / "sweep.yaml", "--device", "cuda", "--output", "out") == 2
    assert "--device cuda needs a GPU: the cluster has none; use --device cpu or auto" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_none_finished(main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one trial meets, all meet: the command names it and ends with 2."""
    overrides = ["--set", "space={training.batch_size: [100000, 200000]}"]
    assert main("--config", recorded / "sweep.yaml", "--local", "--output", "out", *overrides) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "at least one trial must finish, none of 2 has; 000-batch_size-100000: " in error
    assert "must hold at least one batch" in error
    assert [row["status"] for row in results(tmp_path / "out")] == ["failed", "failed"]
