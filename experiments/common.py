"""What every command shares: flags, errors to exit codes, and the connection to Ray."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from invdyn.config import load_config
from invdyn.errors import InvdynError
from invdyn.transitions.dataset_config import DatasetConfig

EXIT_INTERRUPTED = 130
# The project, also for a script that `ray submit` has copied elsewhere: this module is not copied.
ROOT = Path(__file__).resolve().parent.parent


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command that uses Ray takes."""
    parser.add_argument("--local", action="store_true", help="one process, no Ray: breakpoints work")
    parser.add_argument("--num_workers", type=positive_int, default=None, metavar="N", help="parallel workers")
    parser.add_argument(
        "--storage",
        metavar="FOLDER",
        help="shared folder or URL that data/ and runs/ lie below (default: the config's, else this folder)",
    )
    parser.add_argument("--smoke", action="store_true", help="shrink the work to seconds on a CPU")
    parser.add_argument(
        "--address", default=None, help="address of a running Ray cluster, or 'auto' for this machine's"
    )
    parser.add_argument(
        "--wandb",
        choices=("online", "offline", "disabled"),
        default=None,
        help="W&B mode (default: WANDB_MODE, else online where there is an account, else offline)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides", help="override a config value"
    )


def add_hang_timeout(parser: argparse.ArgumentParser) -> None:
    """Add the flag of commands that train."""
    parser.add_argument(
        "--hang_timeout_s",
        type=float,
        metavar="S",
        help="workers that take no step for so long are restarted; 0 for no limit (default: 600; never with --local)",
    )


def positive_int(text: str) -> int:
    """Parse a flag's value that must be a whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return value


def device_name(text: str) -> str:
    """Parse auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def run_command(main: Callable[[], None]) -> None:
    """Run a command: bad input ends with one line and exit code 2, Ctrl-C with 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name may be no text
    try:
        main()
    except InvdynError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, run the same command again to continue", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def load_dataset_config(path: str | Path, given_storage: str | None, overrides: Sequence[str] = ()) -> DatasetConfig:
    """Load a dataset config whose `storage` is the given one, if one is given.

    Raises:
        ConfigError: naming the file and the key.
    """
    config = load_config(DatasetConfig, path, overrides)
    return config.replace(storage=given_storage) if given_storage else config


def connect(
    args: argparse.Namespace,
    uses: Callable[[dict[str, float]], str] = lambda _: "",
    *,
    uses_data: bool = False,
    device: str = "1 CPU",
) -> None:
    """Start Ray on this machine, or join the cluster at `--address` or `RAY_ADDRESS`; with `--local` start nothing.

    Says on stderr where the command runs, what is there, and what it will use. Ray's own chatter is turned off unless
    INVDYN_RAY_VERBOSE is set: that hides warnings about waiting for resources too.

    Args:
        args: the command's flags.
        uses: from the cluster's resources, those that its autoscaler can add included, to what the command will use of
            them; raises ConfigError where they are not enough.
        uses_data: import Ray Data and make it as quiet as the rest: it sets its log level on import.
        device: what the command will use with `--local`.

    Raises:
        InvdynError: when there is no cluster at the address, or it does not let this machine in.
        ConfigError: see `uses`.
    """
    if args.local:
        say_local(device)
        return
    quiet = not os.environ.get("INVDYN_RAY_VERBOSE")
    defaults = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    # Of a node that was cut off: else Ray (2.60) waits minutes for a task that it sent there. Not the time between two
    # pings: servers take more of them than one in five minutes for an attack, and end the connection.
    defaults["RAY_grpc_client_keepalive_timeout_ms"] = "20000"
    if quiet:
        defaults |= {"RAY_AIR_NEW_OUTPUT": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_DEDUP_LOGS": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    address = args.address or os.environ.get("RAY_ADDRESS")
    start_ray(address, args.num_workers or 0, quiet)
    if uses_data and quiet:
        importlib.import_module("ray.data")

        logging.getLogger("ray.data").setLevel(logging.ERROR)
    description, resources = describe_cluster(address)
    plan = uses(resources)
    print(f"ray: {description}{plan and '; uses '}{plan}", file=sys.stderr)


def say_local(device: str) -> None:
    """Say on stderr that a command runs in this process, what this machine has, and what it will use."""
    torch = sys.modules.get("torch")  # seconds to import: what can use a GPU has done so
    gpus = torch.cuda.device_count() if torch else 0
    has = f"{os.cpu_count()} CPUs" + (f", {gpus} GPUs" if torch else "")
    print(f"local: one process on this machine, {has}; uses {device}", file=sys.stderr)


def start_ray(address: str | None, num_workers: int, quiet: bool) -> None:
    """Join the cluster at an address, or start one on this machine, unless that has been done.

    Raises:
        InvdynError: when there is no cluster at the address, or it does not let this machine in.
    """
    import ray  # after the environment: Ray reads it on import

    if ray.is_initialized():
        return
    options = {"log_to_driver": not quiet, "logging_level": "ERROR" if quiet else "INFO"}
    if not address:
        # Logical CPUs only schedule: at least two let a two-worker run start on a one-core machine.
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, 2, num_workers + 1), **options)
        return
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        # Ray says the same when nobody answers and when the token is refused.
        raise InvdynError(
            f"no Ray cluster lets this machine in at {address}: {' '.join(str(error).split())}; start one or drop "
            f"--address. A cluster with a token needs RAY_AUTH_MODE=token (now {os.environ.get('RAY_AUTH_MODE')!r}) "
            "and the same ~/.ray/auth_token"
        ) from None


def describe_cluster(address: str | None) -> tuple[str, dict[str, float]]:
    """Return in words what the connected cluster has, and its resources as large as it may grow."""
    import ray

    now = ray.cluster_resources()
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    where = "this machine" if not address else address if "://" in address else ray.get_runtime_context().gcs_address
    text = f"{where}, {num_nodes} node(s), {now.get('CPU', 0):g} CPUs, {now.get('GPU', 0):g} GPUs"
    if not address:
        return text, now
    from invdyn.training.distributed import cluster_resources  # slow to import

    largest = cluster_resources()
    if any(largest.get(name, 0) > now.get(name, 0) for name in ("CPU", "GPU")):
        text += f" (may grow to {largest.get('CPU', 0):g} CPUs, {largest.get('GPU', 0):g} GPUs)"
    return text, largest


def plan_tasks(num_workers: int | None) -> Callable[[dict[str, float]], str]:
    """Return what `connect` says of a command that runs tasks of one CPU each."""
    return lambda resources: f"at most {num_workers or int(resources.get('CPU', 1))} tasks at a time, 1 CPU each"
