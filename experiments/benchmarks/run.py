"""Run all benchmarks one after another; each prints a table and writes runs/benchmarks/NAME.json."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("training", "accuracy", "extraction", "sweep_overhead")


def import_seconds() -> float:
    """Return the median wall time that `import invdyn` adds to a start of Python."""

    def seconds(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - started

    return sorted(seconds("import invdyn") - seconds("pass") for _ in range(7))[3]


def main() -> None:
    """Run the benchmarks named on the command line, or all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "RAY_USAGE_STATS_ENABLED": "0"}
    print(f"import invdyn: {import_seconds():.3f} s", flush=True)
    for name in sys.argv[1:] or NAMES:
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True, env=environment)


if __name__ == "__main__":
    main()
