from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from invdyn.training.checkpoint import list_checkpoints
from invdyn.training.run_config import RunConfig
from tests.experiments.conftest import RunHere
from tests.training.runs import FLOW, LINEAR, RECIPE, assert_same_run, dataset_config, make_dataset, read_metrics_csv


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and its configs, shared by all tests: none may write into it."""
    folder = tmp_path_factory.mktemp("train")
    make_dataset(folder)
    values = dataset_config(folder).model_dump(mode="json", exclude_none=True)
    (folder / "dataset.yaml").write_text(yaml.safe_dump(values))
    (folder / "model.yaml").write_text(yaml.safe_dump({**FLOW, "training": RECIPE}))
    (folder / "linear.yaml").write_text(yaml.safe_dump(LINEAR))
    return folder


@pytest.fixture
def main(command: Callable[..., RunHere]) -> RunHere:
    return command("train", "--wandb", "disabled")


def flags(recorded: Path, run_dir: Path | str, model: str = "model.yaml") -> list[object]:
    new = ["--dataset_config", recorded / "dataset.yaml", "--model_config", recorded / model]
    return [*new, "--run_dir", run_dir, "--local", "--device", "cpu"]


def start(repository: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(repository / "experiments/train.py"), "--wandb", "disabled", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(run_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not list_checkpoints(run_dir) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_run(main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(*flags(recorded, "run"), "--num_epochs", 2, "--batch_size", 32, "--learning_rate", "3e-3", "--seed", 5)
        == 0
    )
    config = RunConfig.load(tmp_path / "run")
    recipe = config.training
    assert (recipe.num_epochs, recipe.batch_size, recipe.learning_rate, recipe.seed) == (2, 32, 3e-3, 5)
    assert recipe.ema_decay == RECIPE["ema_decay"]
    assert config.model.training == recipe  # models that are fitted take their seed from there
    captured = capsys.readouterr()
    assert "epoch 2/2" in captured.out
    assert captured.out.endswith(f"run: {tmp_path / 'run'}\n")
    assert captured.err.startswith(f"local: one process on this machine, {os.cpu_count()} CPUs, ")
    assert captured.err.endswith(" GPUs; uses cpu\n")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "train.log",
    ]


def test_smoke_and_set(main: RunHere, recorded: Path, tmp_path: Path) -> None:
    overrides = ["--set", "down_dims=[8]", "--set", "training.batch_size=16"]
    assert main(*flags(recorded, "run"), "--smoke", *overrides) == 0
    config = RunConfig.load(tmp_path / "run")
    assert config.model.to_values()["down_dims"] == [8]
    assert (config.training.num_epochs, config.training.batch_size) == (1, 16)


def test_default_run_folder(main: RunHere, recorded: Path, tmp_path: Path) -> None:
    arguments = flags(recorded, "run", "linear.yaml")
    del arguments[4:6]
    assert main(*arguments) == 0
    assert len(list((tmp_path / "runs/tiny").glob("linear-*/config.yaml"))) == 1


def test_diverged_exits_with_1(
    main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*flags(recorded, "run"), "--learning_rate", "1e30") == 1
    errors = capsys.readouterr().err
    (where, error) = errors.splitlines()
    assert where.startswith("local: one process")
    assert error.startswith("error: training loss must stay finite: it is ")
    assert "lower learning_rate (1e+30)" in error


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_then_resumed_equals_an_uninterrupted_run(
    main: RunHere, repository: Path, recorded: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    recipe = ["--num_epochs", 80]
    process = start(repository, *flags(recorded, tmp_path / "run"), *recipe)
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(stop)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if stop == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    if stop == signal.SIGINT:
        assert f"continue with --resume {tmp_path / 'run'}" in errors
    reached = len(list_checkpoints(tmp_path / "run"))
    assert reached >= 1
    assert main("--resume", tmp_path / "run", "--local") == 0
    assert main(*flags(recorded, "whole"), *recipe) == 0
    assert "continuing from step" in (tmp_path / "run/train.log").read_text()
    assert len(read_metrics_csv(tmp_path / "run")) == 20
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_resume_of_a_run_that_has_ended(
    main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*flags(recorded, "run"), "--num_epochs", 1) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    before = read_metrics_csv(tmp_path / "run")
    assert main("--resume", "run", "--local") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == last
    assert read_metrics_csv(tmp_path / "run") == before


def test_resume_where_and_how_may_change(main: RunHere, recorded: Path, tmp_path: Path) -> None:
    assert main(*flags(recorded, "run"), "--num_epochs", 1) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main("--resume", "moved", "--local", "--device", "auto", "--cpu_threads", 2) == 0
    config = RunConfig.load(tmp_path / "moved")
    assert (config.run_dir, config.device, config.cpu_threads) == (str(tmp_path / "moved"), "auto", 2)
    assert list(tmp_path.iterdir()) == [tmp_path / "moved"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--learning_rate", "1"], "--learning_rate"),
        (["--seed", "0"], "--seed"),
        (["--num_epochs", "9", "--batch_size", "8"], "--num_epochs, --batch_size"),
        (["--model_config", "model.yaml"], "--model_config"),
        (["--run_dir", "other"], "--run_dir"),
        (["--compile"], "--compile"),
        (["--smoke"], "--smoke"),
        (["--set", "name=x"], "--set"),
    ],
)
def test_resume_with_changed_flags_is_refused(
    main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main("--resume", "run", "--local", *arguments) == 2
    errors = capsys.readouterr().err
    assert errors == f"error: --resume continues a run as it was started; drop {named} or start a new run\n"


def test_resume_of_what_is_not_a_run(
    main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*flags(recorded, "run"), "--num_epochs", 1) == 0
    (tmp_path / "empty").mkdir()
    folder = list_checkpoints(tmp_path / "run")[0]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for path, message in (
        ("absent", "config file not found"),
        ("empty", "config file not found"),
        (folder, f"--resume takes a run folder, got the checkpoint {folder}; give {tmp_path / 'run'}"),
    ):
        assert main("--resume", path, "--local") == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: {message}")
        assert errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_on_a_dataset_that_was_made_anew(
    main: RunHere, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*flags(recorded, "run"), "--num_epochs", 1) == 0
    config = RunConfig.load(tmp_path / "run")
    other = make_dataset(tmp_path, seed=1)
    (tmp_path / "run/config.yaml").write_text(config.replace(dataset_path=str(other.path)).to_yaml())
    assert main("--resume", "run", "--local") == 2
    assert "must continue on the rows it started with" in capsys.readouterr().err


BAD_YAML = {
    "malformed.yaml": "name: [1, 2",
    "list.yaml": "- 1",
    "unknown_key.yaml": yaml.safe_dump({**FLOW, "down_dim": [8]}),
    "unknown_target.yaml": yaml.safe_dump({**FLOW, "_target_": "os.system"}),
    "no_target.yaml": "name: x",
    "nested.yaml": yaml.safe_dump({**FLOW, "training": {"learning_rat": 1}}),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_config", "absent.yaml"], "config file not found: absent.yaml"),
        (["--model_config", "malformed.yaml"], "malformed.yaml is not valid YAML: line 1"),
        (["--model_config", "list.yaml"], "list.yaml must hold a mapping of names to values, got list"),
        (["--model_config", "unknown_key.yaml"], "unknown key 'down_dim'; did you mean 'down_dims'?"),
        (["--model_config", "nested.yaml"], "unknown key 'training.learning_rat'; did you mean 'learning_rate'?"),
        (["--model_config", "unknown_target.yaml"], "_target_ must name a model, got 'os.system'; known names: "),
        (["--model_config", "no_target.yaml"], "required key '_target_' is missing"),
        (["--set", "solver=rk4"], "'angular_euler', 'angular_midpoint' or 'angular_adams', got 'rk4'"),
        (["--set", "down_dims"], "--set takes key.path=value, got 'down_dims'"),
        (["--dataset_config", "absent.yaml"], "config file not found: absent.yaml"),
        (["--dataset_config", "list.yaml"], "must hold a mapping"),
        (["--dataset_config", "missing.yaml"], "dataset not found: "),
        (["--dataset_config", "unfinished.yaml"], "dataset is unfinished: "),
        (["--device", "cuda:99"], "device 'cuda:99' must exist: this machine has "),
        (["--device", "gpu"], "device: String should match pattern"),
        (["--learning_rate", "0"], "learning_rate: Input should be greater than 0, got 0.0"),
        (["--learning_rate=-1e-3"], "learning_rate: Input should be greater than 0, got -0.001"),
        (["--learning_rate", "nan"], "learning_rate: Input should be a finite number, got nan"),
        (["--seed", "-1"], "seed: Input should be greater than or equal to 0, got -1"),
        (["--seed", str(2**63)], "seed: Input should be less than 9223372036854775808"),
        (["--batch_size", "100000"], "must hold at least one batch: it has 1680 rows, batch_size is 100000"),
        (["--num_workers", "2"], "--local trains in one process, got --num_workers 2; drop one of them"),
        (["--run_dir", "taken"], "run folder exists already: "),
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
    for name, text in BAD_YAML.items():
        (tmp_path / name).write_text(text)
    for name in ("missing", "unfinished"):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nbuffer_path: {tmp_path}/sequence/{name}\n")
    (tmp_path / "inverse_dynamics/unfinished/train").mkdir(parents=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(*flags(recorded, "run"), *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (["--num_workers", 65], "must hold a row for each worker: got 64 for 65 workers"),
        (["--num_workers", 2, "--min_workers", 3], "--min_workers must be at most --num_workers: got 3 of 2"),
    ],
)
def test_batch_that_workers_cannot_share_is_found_before_ray_starts(
    main: RunHere,
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: list[object],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = [flag for flag in flags(recorded, "run") if flag != "--local"]
    assert main(*arguments, *workers) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_gpus_on_ray(
    main: RunHere,
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ray_session: None,
) -> None:
    monkeypatch.setattr("invdyn.training.distributed.cluster_resources", lambda: {"CPU": 8.0})
    arguments = [flag for flag in flags(recorded, "run") if flag != "--local"]
    assert main(*arguments, "--device", "cuda") == 2
    assert "--device cuda needs a GPU for each worker: 1 worker(s), the cluster has 0 GPUs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [[], ["--dataset_config", "x.yaml"], ["--model_config", "x.yaml"]])
def test_missing_flags(main: RunHere, capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    assert main("--local", *given) == 2
    assert capsys.readouterr().err.startswith("error: a new run needs --dataset_config and --model_config; an old one")


def test_an_unknown_flag_and_a_bad_number(main: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--learning_rte", "1") == 2
    assert main("--num_epochs", "0") == 2
    assert "must be a whole number above 0, got '0'" in capsys.readouterr().err
