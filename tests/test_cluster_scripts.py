"""Scripts and image of configs/cluster/ do what they say: run with stand-ins for pip, srun and scontrol."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.scripts.scripts import cli

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "cluster"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))
TOKEN = "0123456789abcdef0123456789abcdef"


def stand_in(path: Path, body: str = "") -> Path:
    """Write a program that appends its name and arguments to calls.txt beside it, and then runs `body`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/bash\n{{ printf "%s " "${{0##*/}}" "$@"; echo; }} >> "${{0%/*}}/calls.txt"\n{body}\n')
    path.chmod(0o755)
    return path


def calls(folder: Path) -> list[str]:
    return [line.rstrip() for line in (folder / "calls.txt").read_text().splitlines()]


def run(command: list[str | Path], **environment: str | Path) -> subprocess.CompletedProcess[str]:
    kept = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True)


@pytest.fixture
def home(tmp_path) -> Path:
    """A home folder as the file mounts leave it: the project, the token as rsync brings it, a virtual environment."""
    home = tmp_path / "home"
    shutil.copytree(FOLDER, home / "invdyn" / "configs" / "cluster")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(FOLDER.parent.parent / name, home / "invdyn" / name)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    (home / ".ray" / "auth_token").chmod(0o644)
    stand_in(home / "invdyn-venv" / "bin" / "pip")
    return home


def prepare(home: Path, storage: Path) -> subprocess.CompletedProcess[str]:
    return run(["bash", home / "invdyn" / "configs" / "cluster" / "prepare_node.sh", storage], HOME=home)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound_bash(script):
    check = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    done = subprocess.run([*check, FOLDER / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_install_takes_torch_then_invdyn_all_pinned(tmp_path):
    stand_in(tmp_path / "venv" / "bin" / "pip")
    assert run(["bash", FOLDER / "install.sh", tmp_path / "venv", "test,lint"]).returncode == 0
    root = FOLDER.parent.parent
    pip = f"pip install --quiet --disable-pip-version-check -c {root}/constraints.txt"
    assert calls(tmp_path / "venv" / "bin") == [f"{pip} torch", f"{pip} -e {root}[s3,gcs,test,lint]"]


def test_what_is_installed_is_not_installed_again_until_it_changes(home):
    script, venv = home / "invdyn" / "configs" / "cluster" / "install.sh", home / "invdyn-venv"
    counts = []
    for extras in ("", "", "aws", "aws"):
        assert run(["bash", script, venv, extras]).returncode == 0
        counts.append(len(calls(venv / "bin")))
    assert counts == [2, 2, 4, 4]
    with (home / "invdyn" / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    assert run(["bash", script, venv]).returncode == 0
    assert len(calls(venv / "bin")) == 6
    stand_in(venv / "bin" / "pip", "exit 3")
    assert run(["bash", script, venv, "test"]).returncode == 3
    assert run(["bash", script, venv, "test"]).returncode == 3  # a failed installation is none


def test_install_makes_the_environment_with_the_chosen_python_and_stops_where_that_fails(tmp_path):
    python = stand_in(tmp_path / "bin" / "python3.99", "exit 3")
    assert run(["bash", FOLDER / "install.sh", tmp_path / "venv"], PYTHON=python).returncode == 3
    assert calls(tmp_path / "bin") == [f"python3.99 -m venv {tmp_path}/venv"]


def test_everyone_installs_with_the_one_script(repository):
    """Nobody else calls pip; the image installs what the nodes install."""
    makefile = (repository / "Makefile").read_text()
    assert "configs/cluster/install.sh .venv test,lint,export" in makefile
    users = [repository / "Makefile", *(path for path in FOLDER.iterdir() if path.name != "install.sh")]
    for path in users:
        found = set(re.findall(r"\S*pip3? install", path.read_text()))
        assert found <= {".venv-peers/bin/pip install"}, path  # the libraries that the leaderboard compares with


def test_a_node_gets_token_environment_links_and_installation(home, tmp_path):
    storage = tmp_path / "shared"
    for _ in range(2):  # the second `ray up` changes nothing
        done = prepare(home, storage)
        assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
    lines = (home / ".bashrc").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 3
    shown = run(["bash", "--norc", "-c", '. ~/.bashrc; echo "$RAY_AUTH_MODE|$PATH|$PYTHONPATH"'], HOME=home).stdout
    mode, path, python_path = shown.strip().split("|")
    assert mode == "token"
    assert path.startswith(f"{home}/invdyn-venv/bin:")
    assert python_path == f"{home}/invdyn/experiments:{home}/invdyn"
    for folder in ("data", "runs"):
        assert (home / folder).resolve() == (home / "invdyn" / folder).resolve() == (storage / folder).resolve()
    assert (home / "configs").resolve() == (home / "invdyn" / "configs").resolve()
    assert calls(home / "invdyn-venv" / "bin")[-1].endswith(f"-e {home}/invdyn[s3,gcs]")


def test_a_node_without_the_token_is_refused(home, tmp_path):
    (home / ".ray" / "auth_token").unlink()
    done = prepare(home, tmp_path / "shared")
    assert done.returncode == 1
    assert "the cluster's token must be in" in done.stderr
    assert not (home / "invdyn-venv" / "bin" / "calls.txt").exists()


def test_a_folder_in_the_place_of_a_link_is_refused(home, tmp_path):
    """A link would land inside it, and this node would keep its own data."""
    (home / "data").mkdir()
    done = prepare(home, tmp_path / "shared")
    assert done.returncode == 1
    assert f"{home}/data must be a link to {tmp_path}/shared/data" in done.stderr


def test_storage_that_cannot_be_written_is_refused(home, tmp_path):
    (tmp_path / "shared").write_text("not a folder")
    done = prepare(home, tmp_path / "shared")
    assert done.returncode == 1
    assert "the shared storage must be mounted and writable" in done.stderr


def image_instructions() -> list[str]:
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_holds_what_the_nodes_get_and_no_secret(repository):
    copied = {
        source.rstrip("/")
        for line in image_instructions()
        if line.startswith("COPY")
        for source in line.split()[1:-1]
        if not source.startswith("--")
    }
    mounts = yaml.safe_load((repository / "cluster.yaml").read_text())["file_mounts"]
    assert {source for source in copied if "/" not in source} == {
        local.removeprefix("./") for local in mounts.values() if local.startswith("./")
    }
    for source in copied:
        assert (repository / source).exists(), source
    let_in = {
        line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert let_in == {source for source in copied if "/" not in source}
    assert any(
        "ENV PATH=/opt/invdyn-venv/bin:$PATH" in line and "RAY_AUTH_MODE=token" in line for line in image_instructions()
    )
    assert "auth_token" not in "\n".join(image_instructions())


def test_the_image_installs_before_the_code_changes(repository):
    """And its Python is one that invdyn supports."""
    lines = image_instructions()
    install = next(i for i, line in enumerate(lines) if "install.sh /opt/invdyn-venv" in line)
    assert install < next(i for i, line in enumerate(lines) if re.match(r"COPY .* invdyn \./invdyn", line))
    version = re.match(r"FROM python:3\.(\d+)-", lines[0])
    assert version
    assert int(version[1]) >= 11


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """A job of three nodes with two GPUs each; srun answers for `hostname` and otherwise only notes its call."""
    commands = tmp_path / "slurm-bin"
    stand_in(commands / "srun", 'case "$*" in *hostname*) echo "10.1.2.3 fe80::1";; esac')
    stand_in(commands / "scontrol", "printf '%s\\n' gpu07 gpu08 gpu11")
    (tmp_path / "project").mkdir()
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "gpu[07-08,11]",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path / "project"),
    }


def submit(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", FOLDER / "slurm.sh", *words], env=environment, capture_output=True, text=True)


def test_slurm_starts_one_ray_per_node_and_runs_the_script_on_the_first(slurm, tmp_path):
    done = submit(slurm, "experiments/sweep.py", "--num_workers", "6")
    assert done.returncode == 0, done.stderr
    show, ask, start = calls(tmp_path / "slurm-bin")
    assert show == "scontrol show hostnames gpu[07-08,11]"
    assert ask == "srun --nodes=1 --ntasks=1 --nodelist=gpu07 hostname -I"
    srun, _, rest = start.partition(" ray symmetric-run ")
    ray, _, script = rest.partition(" -- ")
    assert srun == "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --cpus-per-task=16"
    assert ray.startswith("--address 10.1.2.3:30001 --min-nodes 3 --num-cpus=16 --num-gpus=2 ")
    assert script == "python experiments/sweep.py --num_workers 6 --address 10.1.2.3:30001"
    # symmetric-run hands the rest of its flags to `ray start`, whose parser must know them.
    flags = ray.split()[4:]
    parsed = cli.commands["start"].make_context("start", ["--head", *flags]).params
    assert (parsed["num_cpus"], parsed["num_gpus"], parsed["dashboard_host"]) == (16, 2, "127.0.0.1")


def test_slurm_makes_a_private_token_once(slurm, tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    submit(slurm, "experiments/sweep.py")
    first = token.read_text()
    assert len(first) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.chmod(0o644)
    submit(slurm, "experiments/sweep.py")
    assert token.read_text() == first
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_slurm_in_the_container(slurm, tmp_path):
    submit(slurm | {"INVDYN_IMAGE": "docker://r/invdyn:0.1.0"}, "experiments/sweep.py")
    project = slurm["SLURM_SUBMIT_DIR"]
    assert (
        f"apptainer exec --nv --bind {project} --pwd {project} docker://r/invdyn:0.1.0 ray symmetric-run"
        in calls(tmp_path / "slurm-bin")[-1]
    )


def test_slurm_outside_a_job_or_without_a_script_is_refused(slurm):
    assert submit(slurm).returncode == 2
    del slurm["SLURM_JOB_ID"]
    done = submit(slurm, "experiments/sweep.py")
    assert done.returncode != 0
    assert "must run inside a Slurm job" in done.stderr
