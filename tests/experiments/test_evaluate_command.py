"""The baselines that the command trains; its report is tested in tests/evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from invdyn.models.mlp_regression import MLPRegression
from invdyn.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from invdyn.training.loop import train_loop
from invdyn.transitions.store import TransitionStore
from tests.experiments.conftest import RunHere
from tests.training.runs import CPU, FLOW, LINEAR, TWO_STAGES, dataset_config, make_dataset, run_config
from tests.training.test_loop import Stopped, stop_at

TRAINING = "training the MLP baseline: 2 epochs"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TransitionStore:
    return make_dataset(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def run_dir(store: TransitionStore, tmp_path: Path) -> Path:
    train_loop(run_config(store, tmp_path / "run", num_epochs=2, batch_size=32, seed=7), CPU)
    return tmp_path / "run"


@pytest.fixture
def main(command: Callable[..., RunHere]) -> RunHere:
    return command("evaluate", "--smoke", "--device", "cpu")


def baseline(run_dir: Path, store: TransitionStore) -> Checkpoint:
    return load_checkpoint(run_dir / "baselines" / f"mlp-{store.content_hash[:8]}")


def nrmse(run_dir: Path, model: str) -> float:
    values = json.loads((run_dir / "evaluation/metrics.json").read_text())
    (found,) = [each for each in values["results"] if each["model"] == model]
    return float(found["one_sample"]["nrmse"])


def test_the_mlp_baseline_is_trained_like_the_model_and_once(
    main: RunHere, run_dir: Path, store: TransitionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--checkpoint", run_dir) == 0
    assert TRAINING in capsys.readouterr().out
    checkpoint = baseline(run_dir, store)
    assert isinstance(checkpoint.model, MLPRegression)
    recipe = checkpoint.config.training
    assert (recipe.num_epochs, recipe.batch_size, recipe.seed) == (2, 32, 7)
    assert checkpoint.config.dataset_hash == store.content_hash
    (folder,) = list_checkpoints(run_dir / "baselines" / f"mlp-{store.content_hash[:8]}")
    assert folder.name == list_checkpoints(run_dir)[-1].name  # as many steps
    rows = {name: torch.from_numpy(values) for name, values in store.load("test").items()}
    error = checkpoint.model.sample(rows["state"], rows["next_state"])[0].double() - rows["action"].double()
    expected = float(error.square().mean().sqrt() / store.moments.std[-1])
    assert nrmse(run_dir, "mlp") == pytest.approx(expected, rel=1e-5)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert main("--checkpoint", run_dir) == 0
    assert TRAINING not in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert nrmse(run_dir, "mlp") == pytest.approx(expected, rel=1e-5)


def test_a_baseline_that_was_killed_is_trained_anew(
    main: RunHere, run_dir: Path, store: TransitionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--checkpoint", run_dir, "--baselines", "mlp") == 0
    folder = baseline(run_dir, store).folder
    weights = (folder / "model.safetensors").read_bytes()
    folder.rename(folder.with_name(f".{folder.name}.tmp"))
    capsys.readouterr()
    assert main("--checkpoint", run_dir, "--baselines", "mlp") == 0
    assert TRAINING in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("epochs", "warning"),
    [(1, "unfinished: epoch 1 of 4; its flow is not trained yet."), (3, "unfinished: epoch 3 of 4.")],
)
def test_a_run_that_did_not_end(
    main: RunHere, store: TransitionStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: int, warning: str
) -> None:
    with pytest.raises(Stopped):
        train_loop(run_config(store, tmp_path / "cut", TWO_STAGES, num_epochs=4, checkpoints=4), stop_at(epochs))
    assert main("--checkpoint", tmp_path / "cut", "--baselines", "none") == 0
    printed = capsys.readouterr().out
    assert f"warning: The checkpoint is {warning}\n" in printed
    assert warning in (tmp_path / "cut/evaluation/report.html").read_text()


def test_no_baselines(main: RunHere, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--checkpoint", run_dir, "--baselines", "none") == 0
    assert TRAINING not in capsys.readouterr().out
    assert not (run_dir / "baselines").exists()
    values = json.loads((run_dir / "evaluation/metrics.json").read_text())
    assert {each["model"] for each in values["results"]} == {FLOW["name"]}


def test_the_baselines_are_of_the_rows_that_the_model_was_trained_on(
    main: RunHere, run_dir: Path, store: TransitionStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of another dataset would be another task, and may be many more."""
    flags = ("--checkpoint", run_dir, "--dataset_config", other_dataset(tmp_path))
    assert main(*flags, "--output", "other") == 0
    assert baseline(run_dir, store).config.dataset_hash == store.content_hash
    assert len(list((run_dir / "baselines").iterdir())) == 1
    path = Path(store.path)
    path.rename(tmp_path / "gone")
    try:
        capsys.readouterr()
        assert main(*flags, "--output", "gone_report") == 0
    finally:
        (tmp_path / "gone").rename(path)
    said = f"without the MLP baseline: the rows that the model was trained on are not in {store.path}"
    assert said in capsys.readouterr().out
    values = json.loads(Path("gone_report/metrics.json").read_text())
    assert {each["model"] for each in values["results"]} == {FLOW["name"], "linear"}


def test_a_report_of_something_else_gets_a_folder_of_its_own(
    main: RunHere, store: TransitionStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train_loop(run_config(store, run_dir, LINEAR), CPU)
    (best,) = list_checkpoints(run_dir)
    worse = run_dir / "checkpoints/step-000000000-worse"
    shutil.copytree(best, worse)
    metrics = json.loads((worse / "metrics.json").read_text())
    (worse / "metrics.json").write_text(json.dumps({**metrics, "val_loss": 1e3}))
    other = other_dataset(tmp_path)
    name = f"evaluation-tiny-{TransitionStore(str(tmp_path / 'other/inverse_dynamics/tiny')).content_hash[:8]}"
    for flags, folder in [
        ((run_dir,), "evaluation"),
        ((best,), "evaluation"),
        ((worse, "--split", "val"), f"evaluation-{worse.name}-val"),
        ((run_dir, "--dataset_config", other), name),
    ]:
        assert main("--baselines", "none", "--checkpoint", *flags) == 0
        assert capsys.readouterr().out.endswith(f"report: {run_dir / folder}/report.html\n")


def other_dataset(folder: Path) -> Path:
    """Return the config of a dataset with other rows."""
    make_dataset(folder / "other", seed=1)
    values = dataset_config(folder / "other").model_dump(mode="json", exclude_none=True)
    (folder / "other.yaml").write_text(yaml.safe_dump(values))
    return folder / "other.yaml"


def test_a_baseline_that_cannot_be_trained(main: RunHere, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "baselines").write_text("a file where the folder should be")
    assert main("--checkpoint", run_dir, "--baselines", "mlp") == 2
    errors = capsys.readouterr().err
    place, error = errors.splitlines()
    assert place.startswith("local: one process on this machine, ")
    assert place.endswith(" GPUs; uses cpu")
    assert error.startswith("error: run folder cannot be written: ")
    assert not (run_dir / "evaluation/report.html").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output", "file/report"), "error: cannot write the report to file/report: "),
        (("--num_samples", 1), "error: num_samples must be 2 or more"),
        (("--split", "val"), "error: the val split must have rows, "),
    ],
)
def test_what_cannot_work_is_said_before_a_baseline_is_trained(
    main: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], message: str
) -> None:
    store = make_dataset(tmp_path, val_ratio=0.0)
    train_loop(run_config(store, tmp_path / "run", LINEAR), CPU)
    Path("file").touch()
    assert main("--checkpoint", tmp_path / "run", *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert TRAINING not in printed.out
    assert not (tmp_path / "run/baselines").exists()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--device", "gpu", "must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("--device", "cuda:99", "device 'cuda:99' must exist"),
        ("--num_samples", "0", "must be a whole number above 0, got '0'"),
        ("--seed", "-1", "must be a whole number, 0 or above, got '-1'"),
    ],
)
def test_bad_flags(
    main: RunHere, run_dir: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str
) -> None:
    assert main("--checkpoint", run_dir, "--baselines", "none", f"{flag}={value}") == 2
    assert message in capsys.readouterr().err
    assert not (run_dir / "evaluation").exists()
