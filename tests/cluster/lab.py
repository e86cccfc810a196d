"""A laptop and the hosts of a cluster on one machine, as real as Linux makes them: see lab.sh.

Everything lives in namespaces below one process. When that process ends, by `close` or because this one has died, the
kernel ends every process inside and drops networks, mounts and files: nothing is left to clean.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).with_name("lab.sh")
LAPTOP = "laptop"
LAPTOP_ADDRESS = "10.77.0.10"
NAMESPACES = tuple(f"--{name}" for name in ("mount", "net", "uts", "ipc", "pid"))
PROGRAMS = ("/usr/sbin/sshd", "ip", "rsync", "curl", "ssh-keygen", "unshare", "nsenter", "setpriv", "pgrep")


def missing() -> str | None:
    """Return why a lab cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    if SCRIPT.is_relative_to("/tmp"):
        return "needs the project outside /tmp, which each host has of its own"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"needs {', '.join(absent)}: `make test-cluster` installs them on Debian and Ubuntu"
    probe = subprocess.run(["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "x", "/mnt"])
    return "needs a machine that lets root make namespaces and mounts" if probe.returncode else None


class Lab:
    """A laptop and hosts, up between `with` and its end, after which nothing of them is left.

    Args:
        repository: the project as the laptop has it, with its .venv.
        bashrc: lines of shell that every host runs at each log-in.
    """

    def __init__(self, repository: Path, bashrc: str = ""):
        self.repository = repository
        self.bashrc = bashrc
        self.logins: dict[str, str] = {}
        self._namespaces: dict[str, set[str]] = {}

    def __enter__(self) -> Lab:
        # pdeathsig: when this process is killed, unshare is, and with it (kill-child) everything inside.
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES),
                *("--fork", "--kill-child", "--mount-proc", str(SCRIPT), "lab"),
            ],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout
        said = self.process.stdout.readline()
        try:
            assert said.strip() == "ready", f"the lab did not start: {said}{self.process.stdout.read()}"
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            (self.inside,) = map(int, children)
            self.add(LAPTOP, LAPTOP_ADDRESS)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything inside: the kernel does, with the first process of the namespaces."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def add(self, name: str, *addresses: str, login: str = "root", key: str = "") -> None:
        """Start a host.

        Args:
            name: at most 12 characters.
            addresses: of the host; the first is the one that it uses itself.
            login: name of its only user.
            key: public key of who may log in; the laptop's own when empty.

        Raises:
            AssertionError: when it does not start.
        """
        self.logins[name] = login
        words = [str(SCRIPT), "add", str(self.repository), name, login, key, *addresses]
        done = subprocess.run(
            self._inside(words), env={**os.environ, "LAB_BASHRC": self.bashrc}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        self._namespaces[name] = set(self.run(name, "readlink /proc/self/ns/net /proc/self/ns/pid").split())

    def remove(self, name: str) -> None:
        """End a host at once, with all that it holds."""
        del self.logins[name], self._namespaces[name]
        subprocess.run(self._inside(["bash", "-c", f"kill -KILL $(cat /mnt/{name}.pid)"]), check=True)

    def link(self, name: str, state: str) -> None:
        """Cut a host from the network ("down") or connect it again ("up")."""
        subprocess.run(self._inside(["ip", "link", "set", f"to-{name}", state]), check=True)

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """Cut a host from the network for as long as the block takes."""
        self.link(name, "down")
        try:
            yield
        finally:
            self.link(name, "up")

    def run(self, host: str, command: str, *, timeout_s: float = 600) -> str:
        """Run bash on a host, as root with an empty environment and the project's programs; return what it printed.

        Raises:
            AssertionError: when it fails or takes too long, with all that it printed.
        """
        done = subprocess.run(self.command(host, command), capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{host}: {command}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def command(self, host: str, command: str) -> list[str]:
        """Return the words that run bash on a host: first into the lab, which knows its hosts' processes."""
        venv = self.repository / ".venv" / "bin"
        path = f"{venv}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = (
            f"HOME=/home/{self.logins[host]} TERM=dumb LANG=C.UTF-8 PATH={path} RAY_USAGE_STATS_ENABLED=0 "
            "RAY_AUTH_MODE=token RAY_worker_niceness=0"
        )
        enter = 'exec nsenter --target "$(cat "/mnt/$0.pid")" "${@:3}" --root --wd -- env -i $1 bash -c "$2"'
        where = self.repository if host == LAPTOP else "~"
        shell = f"{self.bashrc}\ncd {where}; {command}"
        return self._inside(["bash", "-c", enter, host, environment, shell, *NAMESPACES])

    def namespaces(self) -> set[str]:
        """Return the kernel's names of all network and PID namespaces of the hosts that have not been removed."""
        return set().union(*self._namespaces.values())

    def _inside(self, words: list[str]) -> list[str]:
        return ["nsenter", "--target", str(self.inside), *NAMESPACES, "--", *words]


@contextmanager
def open_lab(repository: Path, hosts: dict[str, str], bashrc: str = "") -> Iterator[Lab]:
    """Open a lab with hosts (names to addresses), and see afterwards that nothing of it is left.

    Raises:
        AssertionError: when something is.
    """
    with Lab(repository, bashrc) as lab:
        for name, address in hosts.items():
            lab.add(name, address)
        yield lab
    assert wait_until_empty(lab.namespaces()) == []


def wait_until_empty(namespaces: set[str]) -> list[str]:
    """Wait for the processes in these namespaces to end; return those that do not."""
    deadline = time.monotonic() + 20
    while (left := processes_in(namespaces)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def processes_in(namespaces: set[str]) -> list[str]:
    """Return the processes of this machine that are in one of these namespaces."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if {str((process / "ns" / kind).readlink()) for kind in ("net", "pid")} & namespaces:
                found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
        except OSError:
            continue  # it has ended meanwhile
    return found
