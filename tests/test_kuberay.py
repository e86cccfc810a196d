"""configs/cluster/kuberay.yaml has kinds, keys and values of KubeRay's ray.io/v1, and agrees with cluster.yaml."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from invdyn.training.distributed import LARGEST_RESOURCES

KINDS = {"PersistentVolumeClaim": "v1", "RayCluster": "ray.io/v1", "RayJob": "ray.io/v1"}
CLUSTER_KEYS = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
JOB_KEYS = {"clusterSelector", "submissionMode", "entrypoint", "backoffLimit", "submitterPodTemplate"}
POD_KEYS = {"securityContext", "tolerations", "containers", "volumes", "restartPolicy"}
CONTAINER_KEYS = {"name", "image", "env", "ports", "resources", "volumeMounts"}

Documents = dict[str, dict[str, Any]]


def key_problems(where: str, value: dict[str, Any], allowed: set[str], required: set[str] | None = None) -> list[str]:
    required = allowed if required is None else required
    return [f"{where}: unknown {key}" for key in value.keys() - allowed] + [
        f"{where}: {key} is missing" for key in required - value.keys()
    ]


def pods(documents: Documents) -> dict[str, dict[str, Any]]:
    cluster, job = documents["RayCluster"]["spec"], documents["RayJob"]["spec"]
    found = {"head": cluster["headGroupSpec"]["template"]["spec"]}
    found |= {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return found | {"submitter": job["submitterPodTemplate"]["spec"]}


def pod_problems(name: str, pod: dict[str, Any]) -> list[str]:
    problems = key_problems(name, pod, POD_KEYS, {"containers"})
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        problems += key_problems(name, container, CONTAINER_KEYS, {"name", "image", "resources"})
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        if name != "submitter" and limits != requests:
            problems.append(f"{name}: limits differ from requests, and Ray reads the limits")
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        problems += [f"{name}: volume {volume} is not there" for volume in mounted - volumes]
        if name != "submitter" and "/mnt/shared" not in {m["mountPath"] for m in container.get("volumeMounts", [])}:
            problems.append(f"{name}: the shared storage is not mounted")
    return problems


def find_problems(documents: Documents) -> list[str]:
    cluster, job = documents["RayCluster"]["spec"], documents["RayJob"]["spec"]
    problems = [
        f"{kind}: apiVersion must be {version}"
        for kind, version in KINDS.items()
        if documents[kind]["apiVersion"] != version
    ]
    problems += key_problems("RayCluster", cluster, CLUSTER_KEYS) + key_problems("RayJob", job, JOB_KEYS)
    problems += key_problems("head", cluster["headGroupSpec"], {"rayStartParams", "template"})
    for group in cluster["workerGroupSpecs"]:
        problems += key_problems(group["groupName"], group, GROUP_KEYS)
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            problems.append(f"{group['groupName']}: replicas outside minReplicas and maxReplicas")
    for name, pod in pods(documents).items():
        problems += pod_problems(name, pod)
    if cluster["authOptions"] != {"mode": "token"}:
        problems.append("RayCluster: token authentication is off")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        problems.append("head: must take no work")
    if job["clusterSelector"] != {"ray.io/cluster": documents["RayCluster"]["metadata"]["name"]}:
        problems.append("RayJob: selects another cluster")
    if len({container["image"] for pod in pods(documents).values() for container in pod["containers"]}) != 1:
        problems.append("images differ")
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for p in pods(documents).values()
        for v in p.get("volumes", [])
        if "persistentVolumeClaim" in v
    }
    if claims != {documents["PersistentVolumeClaim"]["metadata"]["name"]}:
        problems.append("volumes: another claim")
    if documents["PersistentVolumeClaim"]["spec"]["accessModes"] != ["ReadWriteMany"]:
        problems.append("PersistentVolumeClaim: many nodes write to it")
    return problems


@pytest.fixture
def documents(repository) -> Documents:
    text = (repository / "configs" / "cluster" / "kuberay.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_kuberay_has_no_problems(documents):
    assert documents.keys() == KINDS.keys()
    assert find_problems(documents) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda d: d["RayCluster"].update(apiVersion="ray.io/v1alpha1"), "RayCluster: apiVersion"),
        (lambda d: d["RayCluster"]["spec"].update(autoscaling=True), "unknown autoscaling"),
        (lambda d: d["RayCluster"]["spec"].update(authOptions={"mode": "disabled"}), "authentication is off"),
        (lambda d: d["RayCluster"]["spec"]["workerGroupSpecs"][0].update(replicas=9), "replicas outside"),
        (lambda d: d["RayJob"]["spec"].update(clusterSelector={"ray.io/cluster": "x"}), "another cluster"),
        (lambda d: d["RayJob"]["spec"].pop("entrypoint"), "entrypoint is missing"),
        (lambda d: pods(d)["head"]["volumes"].pop(0), "volume shared is not there"),
        (lambda d: pods(d)["gpu-worker"]["containers"][0].update(image="other"), "images differ"),
    ],
)
def test_damage_is_found(damage: Callable[[Documents], Any], problem, documents):
    damaged = copy.deepcopy(documents)
    damage(damaged)
    assert any(re.search(problem, line) for line in find_problems(damaged))


def test_the_version_of_ray_is_the_pinned_one(documents, repository):
    pinned = re.search(r"^ray==(.*)$", (repository / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    assert documents["RayCluster"]["spec"]["rayVersion"] == pinned[1]


def test_sizes_are_those_of_cluster_yaml(documents, repository):
    aws = yaml.safe_load((repository / "cluster.yaml").read_text())
    spec = documents["RayCluster"]["spec"]
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, aws["max_workers"])
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * aws["idle_timeout_minutes"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    (variable,) = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert variable["name"] == LARGEST_RESOURCES
    assert json.loads(variable["value"]) == {
        "CPU": group["maxReplicas"] * int(limits["cpu"]),
        "GPU": group["maxReplicas"] * int(limits["nvidia.com/gpu"]),
    }


def test_the_job_runs_a_command_of_the_project(documents, repository):
    outer = shlex.split(documents["RayJob"]["spec"]["entrypoint"])
    assert outer[:2] == ["bash", "-c"]
    words = shlex.split(outer[2])
    assert (repository / words[words.index("python") + 1]).is_file()
    assert words[-2:] == ["--address", "auto"]
