"""Run all benchmarks one after another; each prints a table and writes runs/benchmarks/NAME.json."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = (
    "training",
    "sampling",
    "accuracy",
    "students",
    "extraction",
    "loaders",
    "sweep_overhead",
    "startup",
    "scaling",
)


def import_seconds() -> float:
    """Return the median wall time that `import invdyn` adds to a start of Python."""

    def seconds(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - started

    return sorted(seconds("import invdyn") - seconds("pass") for _ in range(7))[3]


def main() -> None:
    """Run the benchmarks named on the command line, or all; the first that fails ends with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"NAME must be of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "RAY_USAGE_STATS_ENABLED": "0"}
    print(f"import invdyn: {import_seconds():.3f} s", flush=True)
    for name in names:
        code = subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=False, env=environment).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
