"""Make the problems that models are proven on: record and extract each, from MuJoCo, by its config in configs/dataset/.

python experiments/benchmarks/problems.py [NAME ...]

The same seed gives the same bytes. What is there already is kept; a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from problem import ROOT, problem

sys.path.insert(0, str(ROOT / "experiments"))

from common import positive_int, run_command

PROBLEMS = {
    "pendulum_integrable": "one action is right; the inverse is exact",
    "pendulum_limits": "impacts on joint limits; the inverse is exact off the limits",
    "half_cheetah": "contacts, 5 simulator steps; no exact inverse, the round trip is exact",
    "hopper": "contacts, 4 Runge-Kutta steps; no exact inverse, the round trip is exact",
    "pusher": "an arm and an object, 5 simulator steps; no exact inverse, the round trip is exact",
    "pendulum_two_factor": "force 3 a1 a2: two branches; the posterior is exact",
    "pendulum_antagonist": "force 3 (u1 - u2): a segment; the posterior is exact",
    "pendulum_dead_zone": "no force below .15, full force above 2/3: intervals; the posterior is exact",
}
"""Name of the dataset config, and what is known of the answer."""


def main() -> None:
    """Make the problems named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROBLEMS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where to make them (default: data)")
    parser.add_argument(
        "--episodes", type=positive_int, metavar="N", help="episodes to record of each (default: the config's)"
    )
    args = parser.parse_args()
    if unknown := set(args.names) - set(PROBLEMS):
        parser.error(f"NAME must be of {', '.join(PROBLEMS)}, got {', '.join(sorted(unknown))}")
    for name in args.names or PROBLEMS:
        started = time.process_time()
        store = problem(name, args.folder, args.episodes)
        counts = ", ".join(f"{split} {store.num_rows(split):,}" for split in ("train", "val", "test"))
        print(f"{name}: {counts}; {time.process_time() - started:.1f} CPU-seconds; {PROBLEMS[name]}", flush=True)
        print(f"  {store.path}", flush=True)


if __name__ == "__main__":
    run_command(main)
