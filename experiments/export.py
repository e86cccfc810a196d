"""Export a trained model as one file that runs without this project.

python experiments/export.py --checkpoint RUN_DIR --format torch --output actions.pt2
"""

from __future__ import annotations

import argparse
import sys

from common import device_name, positive_int, run_command

from invdyn.errors import ConfigError
from invdyn.training.checkpoint import load_checkpoint
from invdyn.training.export import FORMATS, describe_program, export_model


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN_DIR", help="a run, or one of its checkpoints")
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--output", required=True, metavar="FILE", help="ends in .pt2, or .onnx for onnx")
    parser.add_argument("--num_inference_steps", type=positive_int, help="solver steps (default: the model's own)")
    parser.add_argument("--solver", help="solver (default: the model's own)")
    parser.add_argument(
        "--device",
        type=device_name,
        default="cpu",
        help="where it will run: cpu (default), auto, cuda or cuda:N",
    )
    return parser.parse_args()


def main() -> None:
    """Export, and print the program's inputs and where it is."""
    args = parse_arguments()
    checkpoint = load_checkpoint(args.checkpoint, args.device)
    if told := checkpoint.unfinished:
        print(f"warning: The checkpoint is {told}.", file=sys.stderr)
    model = checkpoint.with_constant_dims()
    path = export_model(
        model, args.output, args.format, num_inference_steps=args.num_inference_steps, solver=args.solver
    )
    try:
        model.check_sampling(args.num_inference_steps, args.solver)
    except ConfigError:
        print(
            "warning: The checkpoint was not validated with this solver and number of steps: `sample` refuses them.",
            file=sys.stderr,
        )
    print(describe_program(model))
    print(f"program: {path}")


if __name__ == "__main__":
    run_command(main)
