"""The lab is separate hosts, and leaves nothing behind, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.lab import LAPTOP, missing, open_lab, processes_in, wait_until_empty

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
HOSTS = {"head": "10.77.0.11", "w1": "10.77.0.12", "w2": "10.77.0.13"}
SSH = "ssh -o StrictHostKeyChecking=no -o LogLevel=ERROR"


def machine() -> tuple[set[str], str, set[str]]:
    """What a lab might leave on this machine: mounts, network links, temporary folders."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    names = {line.split(":")[1].strip() for line in links.splitlines()}
    return (
        set(Path("/proc/self/mounts").read_text().splitlines()),
        ",".join(sorted(names)),
        set(map(str, Path("/mnt").iterdir())),
    )


def test_hosts_are_separate_and_reach_each_other_by_ssh(repository):
    before = machine()
    with open_lab(repository, HOSTS) as lab:
        namespaces = lab.namespaces()
        assert len(namespaces) == 2 * (1 + len(HOSTS))
        assert lab.run(
            LAPTOP, f"{SSH} 10.77.0.12 'hostname; ls /tmp; touch /tmp/mine /mnt/shared/ours; echo $HOME'"
        ).split() == [
            "w1",
            "/home/root",
        ]
        assert lab.run("w2", "ls /tmp /mnt/shared; ls -d /tmp/mine 2>&1 || true").count("ours") == 1
        assert "mine" not in lab.run("w2", "ls /tmp")
        assert lab.run("w2", f"ls {repository}/invdyn") == ""  # the laptop's code is not a node's
        assert processes_in(namespaces)
        with lab.cut("w1"):
            assert "timed out" in lab.run(LAPTOP, f"{SSH} -o ConnectTimeout=1 10.77.0.12 true 2>&1 || true")
        lab.remove("w2")
        lab.add("late", "10.77.0.14", "10.77.9.14", login="ubuntu")
        assert lab.run(LAPTOP, f"{SSH} ubuntu@10.77.9.14 'hostname; echo $HOME'").split() == ["late", "/home/ubuntu"]
        assert lab.run(LAPTOP, f"{SSH} 10.77.0.12 hostname") == "w1\n"
    assert machine() == before


def test_nothing_is_left_after_a_failure(repository):
    before = machine()
    with pytest.raises(AssertionError, match="exit code 3"), open_lab(repository, HOSTS) as lab:
        namespaces = lab.namespaces()
        lab.run("w1", "setsid sleep 1000 >/dev/null 2>&1 & disown")
        lab.run("w1", "exit 3")
    assert wait_until_empty(namespaces) == []
    assert machine() == before


def test_nothing_is_left_when_the_tests_are_killed(repository):
    before = machine()
    code = (
        "import sys, time; from pathlib import Path; from tests.cluster.lab import open_lab\n"
        f"with open_lab(Path({str(repository)!r}), {HOSTS!r}) as lab:\n"
        "    print(*lab.namespaces(), flush=True); time.sleep(1000)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    namespaces = set(child.stdout.readline().split())
    assert processes_in(namespaces)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert wait_until_empty(namespaces) == []
    assert machine() == before
