"""Every command says where it runs, what is there and what it will use, before it uses it."""

from __future__ import annotations

import argparse
import importlib
import os
from types import ModuleType

import pytest
import torch

from invdyn.errors import ConfigError, InvdynError


@pytest.fixture
def common(repository, monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    return importlib.import_module("common")


def arguments(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"local": False, "address": None, "num_workers": None, **given})


def test_local_says_so_and_starts_no_ray(common, capsys):
    common.connect(arguments(local=True), pytest.fail)
    has = f"{os.cpu_count()} CPUs, {torch.cuda.device_count()} GPUs"
    assert capsys.readouterr().err == f"local: one process on this machine, {has}; uses 1 CPU\n"
    common.connect(arguments(local=True), pytest.fail, device="cuda:0")
    assert capsys.readouterr().err.endswith("; uses cuda:0\n")


def test_cluster_and_use_are_said(common, capsys, ray_session):
    common.connect(arguments(), common.plan_tasks(None))
    common.connect(arguments(), common.plan_tasks(3))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "ray: this machine, 1 node(s), 8 CPUs, 0 GPUs; uses at most 8 tasks at a time, 1 CPU each"
    assert second.endswith("uses at most 3 tasks at a time, 1 CPU each")


def test_what_the_autoscaler_may_add_counts(common, capsys, ray_session, monkeypatch):
    monkeypatch.setenv("INVDYN_LARGEST_RESOURCES", '{"CPU": 24, "GPU": 4}')
    common.connect(arguments(address="auto"), lambda resources: f"{resources['GPU']:g} GPUs")
    line = capsys.readouterr().err.strip()
    assert line.endswith("1 node(s), 8 CPUs, 0 GPUs (may grow to 24 CPUs, 4 GPUs); uses 4 GPUs")
    assert "auto" not in line  # the cluster's address, not the word that found it


def test_a_plan_that_cannot_be_met_ends_the_command(common, ray_session, repository):
    train = importlib.import_module("train")
    config = argparse.Namespace(device="cuda", num_workers=2, min_workers=None)
    with pytest.raises(ConfigError, match="needs a GPU for each worker: 2 worker"):
        common.connect(arguments(), lambda resources: train.plan_workers(config, resources))
    assert train.plan_workers(config, {"GPU": 2.0}) == "2 worker(s) with 1 GPU each"
    config.device = "auto"
    assert train.plan_workers(config, {}) == "2 worker(s) with 1 CPU each"
    config.min_workers = 1
    assert train.plan_workers(config, {}) == "1 to 2 worker(s) with 1 CPU each"


def test_no_cluster_at_the_address(common, monkeypatch):
    """What Ray says when nobody answers or the token is refused, without its 20 seconds."""
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:6379")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(
        InvdynError, match=r"no Ray cluster lets this machine in at 192.0.2.1:6379.*RAY_AUTH_MODE=token"
    ):
        common.connect(arguments(address="192.0.2.1:6379"))
