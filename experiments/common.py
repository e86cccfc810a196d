"""What every command shares: flags, errors to exit codes, and the connection to Ray."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable

from invdyn.errors import InvdynError

EXIT_INTERRUPTED = 130


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command that uses Ray takes."""
    parser.add_argument("--local", action="store_true", help="one process, no Ray: breakpoints work")
    parser.add_argument("--num_workers", type=positive_int, default=None, metavar="N", help="parallel workers")
    parser.add_argument("--smoke", action="store_true", help="shrink the work to seconds on a CPU")
    parser.add_argument(
        "--address", default=None, help="address of a running Ray cluster, or 'auto' for this machine's"
    )
    parser.add_argument(
        "--wandb",
        choices=("online", "offline", "disabled"),
        default=None,
        help="W&B mode (default: WANDB_MODE, else offline)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides", help="override a config value"
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


def run_command(main: Callable[[], None]) -> None:
    """Run a command: bad input ends with one line and exit code 2, Ctrl-C with 130."""
    try:
        main()
    except InvdynError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, run the same command again to continue", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def connect(args: argparse.Namespace, *, uses_data: bool = False) -> None:
    """Start Ray on this machine, or join the cluster at `--address` or `RAY_ADDRESS`; do nothing with `--local`.

    With `uses_data`, Ray Data is imported and made as quiet as the rest: it sets its log level on import. Ray's own
    chatter is turned off unless INVDYN_RAY_VERBOSE is set: that hides warnings about waiting for resources too.
    """
    if args.local:
        return
    quiet = not os.environ.get("INVDYN_RAY_VERBOSE")
    defaults = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    if quiet:
        defaults |= {"RAY_AIR_NEW_OUTPUT": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_DEDUP_LOGS": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import ray  # after the environment: Ray reads it on import

    if ray.is_initialized():
        return
    address = args.address or os.environ.get("RAY_ADDRESS")
    options = {"log_to_driver": not quiet, "logging_level": "ERROR" if quiet else "INFO"}
    if address:
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise InvdynError(
                f"no Ray cluster at {address}: {' '.join(str(error).split())}; start one or drop --address"
            ) from None
    else:
        # Logical CPUs only schedule: at least two let a two-worker run start on a one-core machine.
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, 2, (args.num_workers or 0) + 1), **options)
    if uses_data and quiet:
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
    total = ray.cluster_resources()
    print(
        f"ray: {address or 'this machine'}, {len([n for n in ray.nodes() if n['Alive']])} node(s), "
        f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs",
        file=sys.stderr,
    )
