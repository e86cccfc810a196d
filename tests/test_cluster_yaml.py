"""What `ray up` reads is what Ray and the clouds accept and invdyn needs; docs/cluster.md uses Ray's own commands."""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import click
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

AWS, GCP, LOCAL = "cluster.yaml", "configs/cluster/gcp.yaml", "configs/cluster/local.yaml"
COMMAND_KEYS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# Ray's schema does not look inside; a misspelt key would be ignored.
CLOUD_KEYS = {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips"}
PROVIDER_KEYS = {"aws": CLOUD_KEYS, "gcp": CLOUD_KEYS | {"project_id"}, "local": {"type", "head_ip", "worker_ips"}}
INSTALL_ON_HEAD = {
    cloud: [f"bash ~/invdyn/configs/cluster/install.sh ~/invdyn-venv {cloud}"] for cloud in ("aws", "gcp")
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
    provider = config["provider"]
    problems = [f"provider: unknown {key}" for key in provider.keys() - PROVIDER_KEYS[provider["type"]]]
    if provider["type"] == "local":
        num_workers = len(provider["worker_ips"])
        if not config["min_workers"] == config["max_workers"] == num_workers:
            problems.append("min_workers and max_workers: differ from the number of worker_ips")
        return problems
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    workers = {name: node for name, node in types.items() if name != config["head_node_type"]}
    for name, node in types.items():
        problems += [f"{name}: {problem}" for problem in MACHINE_PROBLEMS[provider["type"]](node, head)]
        if node.get("min_workers", 0) > node.get("max_workers", 0):
            problems.append(f"{name}: min_workers above max_workers")
    if sum(node.get("max_workers", 0) for node in workers.values()) != config["max_workers"]:
        problems.append("max_workers: differs from the sum over the worker types")
    if head["resources"].get("CPU") != 0 or head.get("max_workers") != 0:
        problems.append("head: must take no work")
    if not any("spot" in json.dumps(node["node_config"]).lower() for node in workers.values()):
        problems.append("workers: none is spot")
    return problems


def aws_problems(node: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """Amazon's own description of an instance, all that Ray would otherwise fill in, and one image for all."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    counts = {"MinCount": 1, "MaxCount": 1}  # added by Ray
    report = ParamValidator().validate(counts | node["node_config"], shape).generate_report()
    problems = report.splitlines() + [f"{key} is missing" for key in REQUIRED_NODE_KEYS - node["node_config"].keys()]
    if node["node_config"].get("ImageId") != head["node_config"].get("ImageId"):
        problems.append("ImageId differs from the head's")
    return problems


def gcp_problems(node: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """Google's own description of an instance, a network that is not the open default, and one image for all."""
    api = importlib.resources.files("googleapiclient.discovery_cache.documents") / "compute.v1.json"
    schemas = json.loads(api.read_text())["schemas"]
    problems = list(discovery_problems(node["node_config"], {"$ref": "Instance"}, schemas))
    problems += [
        f"{key} is missing" for key in {"machineType", "disks", "networkInterfaces"} - node["node_config"].keys()
    ]
    if node["node_config"].get("disks") != head["node_config"]["disks"]:
        problems.append("disks and image differ from the head's")
    if not node["resources"]:
        problems.append("resources: Ray does not ask GCP for them")
    return problems


MACHINE_PROBLEMS = {"aws": aws_problems, "gcp": gcp_problems}


def discovery_problems(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Compare a value with a schema of a Google API: names of keys, enumerated values, kinds of values."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kinds = {
        "object": dict,
        "array": list,
        "string": (str, int),
        "boolean": bool,
        "integer": int,
        "number": (int, float),
    }
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{value!r} is not of type {schema['type']}"]
    if isinstance(value, list):
        return [problem for item in value for problem in discovery_problems(item, schema["items"], schemas)]
    if isinstance(value, dict):
        known = schema["properties"]
        return [f"unknown {key}" for key in value.keys() - known.keys()] + [
            problem
            for key in value.keys() & known.keys()
            for problem in discovery_problems(value[key], known[key], schemas)
        ]
    return [f"{value} is none of {schema['enum']}"] if "enum" in schema and value not in schema["enum"] else []


def token_problems(config: dict[str, Any]) -> list[str]:
    """Token authentication: the token on every node, and the mode set wherever Ray starts."""
    problems = []
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        problems.append("token: not mounted")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = next((command for command in config[key] if "ray start" in command), "")
        if "export RAY_AUTH_MODE=token" not in start.partition("ray start")[0]:
            problems.append(f"token: mode not set in {key}")
    if "--dashboard-host=127.0.0.1" not in config["head_start_ray_commands"][-1]:
        problems.append("dashboard: open to more than the head itself")
    return problems


def setup_problems(config: dict[str, Any]) -> list[str]:
    """Set-up: storage first, then the script that all share, which alone decides what is installed."""
    commands = config["setup_commands"]
    problems = []
    if "/mnt/shared" not in commands[0] or commands[1:] != [
        "bash ~/invdyn/configs/cluster/prepare_node.sh /mnt/shared"
    ]:
        problems.append("setup: must reach the storage, then run prepare_node.sh")
    if any("pip install" in command for key in COMMAND_KEYS for command in config[key]):
        problems.append("setup: pip beside install.sh")
    cloud = config["provider"]["type"]
    if config["head_setup_commands"] != INSTALL_ON_HEAD.get(cloud, []):
        problems.append("setup: the head must install what launches workers")
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
def load(repository) -> Callable[[str], dict[str, Any]]:
    return lambda file: yaml.safe_load((repository / file).read_text())


@pytest.mark.parametrize("file", [AWS, GCP, LOCAL])
def test_cluster_yaml_has_no_problems(file, load, repository):
    assert find_problems(load(file), repository) == []


def test_the_clusters_differ_only_in_where_they_run(load):
    aws, gcp, local = load(AWS), load(GCP), load(LOCAL)
    for key in ("cluster_name", "file_mounts", "rsync_exclude", "worker_setup_commands", "worker_start_ray_commands"):
        assert aws[key] == gcp[key] == local[key], key
    start = aws["head_start_ray_commands"]
    assert gcp["head_start_ray_commands"] == start
    assert [c.replace("RAY_enable_autoscaler_v2=0 ", "") for c in local["head_start_ray_commands"]] == start
    for key in ("max_workers", "idle_timeout_minutes", "upscaling_speed", "initialization_commands"):
        assert aws[key] == gcp[key], key


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
        (
            lambda c: _worker(c)["node_config"].update(InstanceTyp="g5.xlarge"),
            "gpu_worker: Unknown parameter in input: .InstanceTyp",
        ),
        (lambda c: _worker(c)["node_config"]["InstanceMarketOptions"].update(Market="spot"), "Unknown .*Market"),
        (lambda c: _worker(c)["node_config"].pop("ImageId"), "gpu_worker: ImageId is missing"),
        (lambda c: _worker(c)["node_config"].update(ImageId="ami-1"), "ImageId differs"),
        (lambda c: _worker(c)["node_config"].pop("IamInstanceProfile"), "IamInstanceProfile is missing"),
        (lambda c: _worker(c)["node_config"].pop("SecurityGroupIds"), "SecurityGroupIds is missing"),
        (lambda c: _worker(c)["node_config"].pop("InstanceMarketOptions"), "none is spot"),
        (lambda c: c["available_node_types"]["head"].update(resources={}), "head: must take no work"),
        (lambda c: c["file_mounts"].pop("~/.ray/auth_token"), "token: not mounted"),
        (lambda c: c.update(worker_start_ray_commands=["ray start"]), "token: mode not set in worker"),
        (lambda c: c.update(head_start_ray_commands=["ray start"]), "dashboard: open"),
        (lambda c: c["setup_commands"].reverse(), "setup: must reach the storage"),
        (lambda c: c["setup_commands"].pop(), "setup: must reach the storage"),
        (lambda c: c["head_setup_commands"].append("pip install boto3"), "pip beside install.sh"),
        (lambda c: c.update(head_setup_commands=[]), "the head must install"),
        (lambda c: c["file_mounts"].pop("~/invdyn/constraints.txt"), "constraints.txt not copied"),
        (lambda c: c["file_mounts"].update({"~/x": "./nowhere"}), "./nowhere is missing"),
        (lambda c: c["setup_commands"].append("if true; then"), "shell: "),
    ],
)
def test_damage_is_found(damage: Callable[[dict[str, Any]], Any], problem, load, repository):
    config = load(AWS)
    damage(config)
    found = find_problems(config, repository)
    assert any(re.search(problem, line) for line in found), found


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda node: node["node_config"].update(machine_type="n2"), "unknown machine_type"),
        (lambda node: node["node_config"].update(scheduling={"provisioningModel": "SPOTTY"}), "SPOTTY is none of"),
        (lambda node: node["node_config"]["disks"][0].update(boot="yes"), "'yes' is not of type boolean"),
        (lambda node: node["node_config"].pop("networkInterfaces"), "networkInterfaces is missing"),
        (lambda node: node.update(resources={}), "resources: "),
    ],
)
def test_damage_is_found_on_gcp(damage: Callable[[dict[str, Any]], Any], problem, load, repository):
    config = load(GCP)
    damage(_worker(config))
    found = find_problems(config, repository)
    assert any(re.search(f"gpu_worker: {problem}", line) for line in found), found


def test_damage_is_found_on_own_machines(load, repository):
    config = load(LOCAL)
    config["provider"]["worker_ips"].append("192.0.2.14")
    assert "min_workers and max_workers: differ from the number of worker_ips" in find_problems(config, repository)


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
