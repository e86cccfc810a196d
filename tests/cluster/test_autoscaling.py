"""cluster.yaml as the autoscaler reads it: what asks for more than is there makes the cluster grow; idle nodes go.

Ray's fake provider starts its nodes on one machine, here the laptop of the lab. All that decides how many and when is
the shipped file's; the idle time is shortened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler._private.util import prepare_config

from tests.cluster.lab import Lab, missing, open_lab
from tests.cluster.laptop import Laptop

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # where `ray up` puts what the head's autoscaler reads
IDLE_SHARE = 0.01
OBJECT_STORE = 100_000_000
DATASET = "configs/dataset/pendulum_integrable.yaml"


def shipped_config(repository: Path) -> dict[str, Any]:
    """Return cluster.yaml with the resources of its instance types, as AWS tells them."""
    import moto

    config = yaml.safe_load((repository / "cluster.yaml").read_text())
    with moto.mock_aws():
        filled: dict[str, Any] = AWSNodeProvider.fillout_available_node_types_resources(config)
    return filled


def with_fake_provider(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the fake provider needs in place of what only AWS can use."""
    types = {}
    for name, node in config["available_node_types"].items():
        # It takes no memory, and its nodes share one machine.
        resources = {key: amount for key, amount in node["resources"].items() if key != "memory"}
        if name == config["head_node_type"]:
            name = FAKE_HEAD_NODE_TYPE
        types[name] = {**node, "resources": {**resources, "object_store_memory": OBJECT_STORE}}
    return {
        **prepare_config(config),
        **{key: [] for key in config if key.endswith("_commands")},
        "file_mounts": {},
        "provider": {
            # Not by its name, under which Ray looks for defaults in a file that its package does not bring (2.60).
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": types,
        "idle_timeout_minutes": config["idle_timeout_minutes"] * IDLE_SHARE,
    }


@pytest.fixture
def lab(repository) -> Iterator[Lab]:
    paths = f"{repository}:{repository}/experiments"
    with open_lab(repository, {}, f"export PYTHONPATH={paths} OMP_NUM_THREADS=1") as lab:
        yield lab


def test_a_sweep_makes_the_cluster_grow_and_idle_nodes_go(lab, repository):
    shipped = shipped_config(repository)
    laptop = Laptop(lab, BOOTSTRAP)
    laptop.write_yaml(yaml.safe_dump(with_fake_provider(shipped)))
    laptop(
        # As `ray up` starts it, and for the fake provider.
        "RAY_enable_autoscaler_v2=1 AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_FAKE_CLUSTER=1 "
        f"RAY_CLOUD_INSTANCE_ID={FAKE_HEAD_NODE_ID} RAY_OVERRIDE_NODE_ID_FOR_TESTING={FAKE_HEAD_NODE_ID} "
        f"ray start --head --port=6379 --num-cpus=0 --object-store-memory={OBJECT_STORE} "
        f"--autoscaling-config={BOOTSTRAP}"
    )
    where = "--storage /tmp/storage --address auto --wandb disabled"
    commands = [
        f"'collect.py --config {DATASET} --smoke {where}'",
        f"'create_dataset.py --config {DATASET} --smoke {where}'",
        f"'sweep.py --set num_trials=6 --set num_epochs=1 --set gpus_per_trial=1 --output /tmp/sweep {where}'",
    ]
    said = laptop(f"python tests/cluster/watch_growth.py 120 python tests/cluster/commands.py {' '.join(commands)}")
    print(said)
    seen = json.loads(next(line for line in said.splitlines() if line.startswith('{"exit code"')))

    limit = shipped["max_workers"]
    worker = shipped["available_node_types"]["gpu_worker"]["resources"]
    assert (limit, worker["CPU"], worker["GPU"]) == (4, 4, 1)
    assert said.count(f"1 node(s), 0 CPUs, 0 GPUs (may grow to {4 * limit} CPUs, {limit} GPUs)") >= 1
    assert "1 CPU and 1 GPU per trial" in said
    assert "best model: /tmp/sweep/best" in said
    assert seen["exit code"] == 0
    assert seen["nodes"][0] == seen["nodes"][-1] == 1
    assert max(seen["nodes"]) == 1 + limit
    assert (seen["largest"]["CPU"], seen["largest"]["GPU"]) == (4 * limit, limit)
