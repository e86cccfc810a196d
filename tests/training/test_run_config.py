from __future__ import annotations

from pathlib import Path

import pytest
import torch

from invdyn.errors import ConfigError
from invdyn.training import run_config as module
from invdyn.training.run_config import RunConfig, current_versions, git_commit, resolve_device
from invdyn.transitions.store import TransitionStore
from tests.training.runs import run_config


def test_yaml_round_trip(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "run", num_epochs=7, resident=False, tracking={"group": "sweep"})
    config.save()
    loaded = RunConfig.load(tmp_path / "run")
    assert loaded == config
    assert (loaded.training.num_epochs, loaded.resident, loaded.tracking.group) == (7, False, "sweep")
    assert type(loaded.model) is type(config.model)


def test_dimensions_and_hash_come_from_the_dataset(store: TransitionStore, tmp_path: Path) -> None:
    config = run_config(store, tmp_path / "run")
    assert (config.state_dim, config.action_dim, config.history, config.horizon) == (2, 1, 0, 1)
    assert config.dataset_hash == store.content_hash
    assert Path(config.dataset_path).is_absolute()
    assert Path(config.run_dir).is_absolute()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "gpu"}, "device: String should match pattern"),
        ({"num_workers": 0}, "num_workers: Input should be greater than or equal to 1"),
        ({"num_worker": 2}, "unknown key 'num_worker'; did you mean 'num_workers'"),
        ({"tracking": {"mod": "offline"}}, "unknown key 'tracking.mod'; did you mean 'mode'"),
    ],
)
def test_bad_values_are_one_line(
    store: TransitionStore, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config(store, tmp_path / "run", **values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_model_in_a_saved_run(store: TransitionStore, tmp_path: Path) -> None:
    text = run_config(store, tmp_path).to_yaml().replace("invdyn.models.FlowInverseDynamics", "os.system")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"_target_ must name a model, got 'os\.system'"):
        RunConfig.load(tmp_path)


def test_device_auto_and_missing_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device(None) == resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="this machine has 0 CUDA devices; use --device cpu or auto"):
        resolve_device("cuda")


def test_device_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="device 'cuda:2' must exist"):
        resolve_device("cuda:2")


def test_versions_are_recorded(store: TransitionStore, tmp_path: Path) -> None:
    versions = run_config(store, tmp_path).versions
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"python", "invdyn", "ray", "commit"} <= versions.keys()
    versions["python"] = "changed"
    assert current_versions()["python"] != "changed"


def test_commit_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "run_config.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == "unknown"
