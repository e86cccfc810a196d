"""Say what is wrong with a recording before anyone trains on it.

python experiments/doctor.py --config configs/dataset/pendulum_integrable.yaml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import positive_int, run_command

from invdyn.config import load_config
from invdyn.doctor.examine import MAX_ROWS, diagnose
from invdyn.doctor.findings import has_errors
from invdyn.doctor.report import render_console, write_reports
from invdyn.transitions.dataset_config import DatasetConfig

OUTPUT_ROOT = Path("runs/doctor")


def main() -> None:
    """Examine, print the findings, write them down."""
    args = parse_arguments()
    config = load_config(DatasetConfig, args.config, args.overrides)
    diagnosis = diagnose(config, max_rows=args.max_rows)
    print(render_console(diagnosis))
    print(f"report: {write_reports(diagnosis, args.output or OUTPUT_ROOT / config.name)}")
    if args.strict and has_errors(diagnosis.findings):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="dataset config")
    parser.add_argument(
        "--max_rows",
        type=positive_int,
        default=MAX_ROWS,
        metavar="N",
        help="states to look at; of a longer recording, evenly spaced episodes (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FOLDER", help=f"folder of the report (default: {OUTPUT_ROOT}/NAME)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when there are errors")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides", help="override a config value"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
