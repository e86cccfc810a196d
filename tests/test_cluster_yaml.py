"""cluster.yaml is what Ray accepts and what invdyn needs; docs/cluster.md uses commands that Ray has."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

COMMAND_KEYS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# Ray's schema does not look inside these two; a misspelt key would only fail on AWS, or be ignored.
PROVIDER_KEYS = {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips"}
NODE_KEYS = {
    "InstanceType",
    "ImageId",
    "IamInstanceProfile",
    "SecurityGroupIds",
    "SubnetIds",
    "KeyName",
    "BlockDeviceMappings",
    "InstanceMarketOptions",
}
REQUIRED_NODE_KEYS = {"InstanceType", "ImageId", "IamInstanceProfile", "SecurityGroupIds", "BlockDeviceMappings"}


def schema_problems(config: dict[str, Any]) -> list[str]:
    """What Ray itself says, with its defaults filled in as `ray up` does."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (jsonschema.ValidationError, ValueError, RuntimeError) as error:
        return [f"schema: {str(error).splitlines()[0]}"]
    return []


def node_problems(config: dict[str, Any]) -> list[str]:
    """Node types: sizes that agree, and nothing left to Ray's defaults."""
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    workers = {name: node for name, node in types.items() if name != config["head_node_type"]}
    problems = [f"provider: unknown {key}" for key in config["provider"].keys() - PROVIDER_KEYS]
    for name, node in types.items():
        keys = node["node_config"].keys()
        problems += [f"{name}: unknown {key}" for key in keys - NODE_KEYS]
        problems += [f"{name}: {key} is missing" for key in REQUIRED_NODE_KEYS - keys]
        if node.get("min_workers", 0) > node.get("max_workers", 0):
            problems.append(f"{name}: min_workers above max_workers")
        if node["node_config"].get("ImageId") != head["node_config"].get("ImageId"):
            problems.append(f"{name}: ImageId differs from the head's")
    if sum(node.get("max_workers", 0) for node in workers.values()) != config["max_workers"]:
        problems.append("max_workers: differs from the sum over the worker types")
    if head["resources"].get("CPU") != 0 or head.get("max_workers") != 0:
        problems.append("head: must take no work")
    if not any("InstanceMarketOptions" in node["node_config"] for node in workers.values()):
        problems.append("workers: none is spot")
    return problems


def token_problems(config: dict[str, Any]) -> list[str]:
    """Token authentication: the token on every node, private, and the mode set wherever Ray starts."""
    problems = []
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        problems.append("token: not mounted")
    if "chmod 600 ~/.ray/auth_token" not in config["setup_commands"]:
        problems.append("token: readable by others")
    if not any("export RAY_AUTH_MODE=token" in command for command in config["initialization_commands"]):
        problems.append("token: mode not set for shells")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = next((command for command in config[key] if "ray start" in command), "")
        if "export RAY_AUTH_MODE=token" not in start.partition("ray start")[0]:
            problems.append(f"token: mode not set in {key}")
    return problems


def setup_problems(config: dict[str, Any]) -> list[str]:
    """Set-up: storage, then torch, then invdyn, all pinned; and only files that exist are copied."""
    commands = config["setup_commands"]
    problems = []

    def position(pattern: str) -> int:
        return next((i for i, command in enumerate(commands) if re.search(pattern, command)), len(commands))

    steps = [position("mount -t nfs4"), position("ln -sfn /mnt/shared/data"), position(" torch$"), position("-e ")]
    if steps != sorted(steps) or steps[-1] == len(commands):
        problems.append("setup: must mount, link, install torch, install invdyn, in this order")
    installs = [command for command in commands + config["head_setup_commands"] if "pip install" in command]
    if not all("-c ~/invdyn/constraints.txt" in command for command in installs):
        problems.append("setup: pip without the pinned versions")
    return problems


def path_problems(config: dict[str, Any], repository: Path) -> list[str]:
    """Mounted paths exist, and bring everything that the installation reads."""
    mounts = {remote: local for remote, local in config["file_mounts"].items() if local.startswith("./")}
    problems = [f"file_mounts: {local} is missing" for local in mounts.values() if not (repository / local).exists()]
    needed = {"invdyn", "experiments", "configs", "setup.cfg", "pyproject.toml", "constraints.txt"}
    return problems + [f"file_mounts: {name} not copied" for name in needed if f"~/invdyn/{name}" not in mounts]


def shell_problems(config: dict[str, Any]) -> list[str]:
    """Every command is valid bash."""
    commands = [command for key in COMMAND_KEYS for command in config[key]]
    checks = [subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True) for command in commands]
    return [f"shell: {check.stderr.strip()}" for check in checks if check.returncode]


def find_problems(config: dict[str, Any], repository: Path) -> list[str]:
    problems = schema_problems(config) + [f"{key}: left to Ray's default" for key in COMMAND_KEYS if key not in config]
    if problems:
        return problems
    return [
        *node_problems(config),
        *token_problems(config),
        *setup_problems(config),
        *path_problems(config, repository),
        *shell_problems(config),
    ]


@pytest.fixture
def config(repository) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster.yaml").read_text())


def test_cluster_yaml_has_no_problems(config, repository):
    assert find_problems(config, repository) == []


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    return config["available_node_types"]["gpu_worker"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda c: c.update(idle_timeout=10), "schema: .*idle_timeout"),
        (lambda c: c.update(head_node_type="haed"), "schema: .*head_node_type"),
        (lambda c: c.update(max_workers="4"), "schema: '4' is not of type"),
        (lambda c: _worker(c).update(min_workers=9), "schema: .*max_workers"),
        (lambda c: _worker(c).update(resources={"GPU": 0.5}), "schema: 0.5"),
        (lambda c: c.pop("setup_commands"), "setup_commands: left to Ray's default"),
        (lambda c: c.update(max_workers=5), "max_workers: differs"),
        (lambda c: _worker(c).update(min_workers=3, max_workers=2), "min_workers above max_workers"),
        (lambda c: c["provider"].update(zone="a"), "provider: unknown zone"),
        (lambda c: _worker(c)["node_config"].update(InstanceTyp="g5.xlarge"), "gpu_worker: unknown InstanceTyp"),
        (lambda c: _worker(c)["node_config"].pop("ImageId"), "gpu_worker: ImageId is missing"),
        (lambda c: _worker(c)["node_config"].update(ImageId="ami-1"), "ImageId differs"),
        (lambda c: _worker(c)["node_config"].pop("IamInstanceProfile"), "IamInstanceProfile is missing"),
        (lambda c: _worker(c)["node_config"].pop("SecurityGroupIds"), "SecurityGroupIds is missing"),
        (lambda c: _worker(c)["node_config"].pop("InstanceMarketOptions"), "none is spot"),
        (lambda c: c["available_node_types"]["head"].update(resources={}), "head: must take no work"),
        (lambda c: c["file_mounts"].pop("~/.ray/auth_token"), "token: not mounted"),
        (lambda c: c["setup_commands"].remove("chmod 600 ~/.ray/auth_token"), "token: readable"),
        (lambda c: c.update(initialization_commands=[]), "token: mode not set for shells"),
        (lambda c: c.update(worker_start_ray_commands=["ray start"]), "token: mode not set in worker"),
        (lambda c: c["setup_commands"].reverse(), "setup: must mount"),
        (lambda c: c["setup_commands"].pop(), "setup: must mount"),
        (lambda c: c["head_setup_commands"].append("pip install boto3"), "without the pinned versions"),
        (lambda c: c["file_mounts"].pop("~/invdyn/constraints.txt"), "constraints.txt not copied"),
        (lambda c: c["file_mounts"].update({"~/x": "./nowhere"}), "./nowhere is missing"),
        (lambda c: c["setup_commands"].append("if true; then"), "shell: "),
    ],
)
def test_damage_is_found(damage: Callable[[dict[str, Any]], Any], problem, config, repository):
    damage(config)
    found = find_problems(config, repository)
    assert any(re.search(problem, line) for line in found), found


def documented_commands(repository: Path) -> list[str]:
    text = (repository / "docs" / "cluster.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    return [line for line in blocks.splitlines() if line.startswith("ray ")]


def parse_with_ray(command: str) -> click.Context:
    """Let Ray's command line parse a command; nothing is run."""
    group: click.Command = cli
    words = shlex.split(command)[1:]
    while isinstance(group, click.Group):
        name = words.pop(0)
        if name not in group.commands:
            raise click.UsageError(f"no such command {name}")
        group = group.commands[name]
    return group.make_context(command, words)


def test_documented_commands_are_rays_own(repository):
    commands = documented_commands(repository)
    assert {"up", "submit", "job", "dashboard", "down"} <= {command.split()[1] for command in commands}
    for command in commands:
        parse_with_ray(command)


def test_a_wrong_documented_command_is_found():
    with pytest.raises(click.UsageError, match="no-wait-at-all"):
        parse_with_ray("ray job submit --no-wait-at-all -- python experiments/sweep.py")
    with pytest.raises(click.UsageError, match="no such command"):
        parse_with_ray("ray launch cluster.yaml")


def test_flags_after_the_dashes_go_to_the_script():
    parsed = parse_with_ray("ray submit cluster.yaml experiments/sweep.py -- --num_workers 4 --address auto").params
    assert (parsed["cluster_config_file"], parsed["script"]) == ("cluster.yaml", "experiments/sweep.py")
    assert parsed["script_args"] == ("--num_workers", "4", "--address", "auto")


def test_documented_scripts_exist(repository):
    text = (repository / "docs" / "cluster.md").read_text()
    for script in set(re.findall(r"experiments/\w+\.py", text)):
        assert (repository / script).is_file(), f"docs/cluster.md names {script}, which is not there"
