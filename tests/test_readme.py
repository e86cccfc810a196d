"""The README keeps its promises: its commands run in order, its snippet after them, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (python experiments/.*)$", README, flags=re.MULTILINE)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
RAYLESS = {
    "evaluate.py": ["--smoke"],
    "doctor.py": [],
    "export.py": [],
}  # scripts without --local, and what shrinks them


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's relative paths lead to the project, and data/ and runs/ are its own."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("experiments", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(code_or_script: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *code_or_script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_every_command_of_the_pipeline_is_shown() -> None:
    shown = [shlex.split(command)[1].rpartition("/")[2] for command in COMMANDS]
    assert shown == ["collect.py", "create_dataset.py", "doctor.py", "train.py", "evaluate.py", "sweep.py", "export.py"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: shlex.split(command)[1].rpartition("/")[2])
def test_command_runs(command: str, workplace: Path) -> None:
    script, *flags = shlex.split(command)[1:]
    if "--num_epochs" in flags:
        flags[flags.index("--num_epochs") + 1] = "2"
    done = run([script, *flags, *RAYLESS.get(Path(script).name, ["--smoke", "--local"])], workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_snippet_runs_after_the_commands(workplace: Path) -> None:
    (snippet,) = SNIPPETS
    done = run(["-c", snippet + "\nprint(tuple(actions.shape) == (8, len(state), 1))"], workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"\b(?:OUTPUT|FIGURES)_[A-Z]+\b", README)


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))])
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing
