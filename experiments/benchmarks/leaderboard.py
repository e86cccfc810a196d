"""Every model on every problem at equal CPU time, several seeds; what is done is kept, so it can be run in pieces.

python experiments/benchmarks/leaderboard.py --problems hopper --models "flow; mixture density" --seeds 0,1

Each (problem, model, seed) is one JSON file below OUTPUT/results; README.md and leaderboard.json are made of all that
are there. Hyperparameters are chosen first, by the energy score on validation rows, with a third of the budget for each
point of a small grid and a seed of its own. --peers names the Python of an environment with sbi and torchcfm
(`make leaderboard-env`); without it the peers are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budget import train_within
from leaderboard_page import write_page
from leaderboard_scores import Predictions, Rows, chosen_by, held_out, judge, predict
from measure import machine
from problem import ROOT, problem

from invdyn.models.registry import TARGET_KEY, load_model_config, parse_model_config
from invdyn.statistics import transition_features
from invdyn.transitions.store import TransitionStore, write_json

PROBLEMS = (
    *("pendulum_integrable", "pendulum_limits", "half_cheetah", "hopper", "pusher"),
    *("pendulum_two_factor", "pendulum_antagonist", "pendulum_dead_zone"),
)
BUDGET_S = 12.0
CHOICE_SHARE, CHOICE_SEED = 1 / 3, 1_000
PEER_TIMEOUT_S = 3_600
OUTPUT = ROOT / "docs" / "leaderboard"


@dataclass(frozen=True)
class Entry:
    """One line of the board.

    Attributes:
        config: file in configs/inverse_dynamics/; None for a peer.
        small: file for the pendulum problems, where it is another.
        library: name in peers.py; None for a model of ours.
        grid: overrides to choose among; one entry: nothing to choose.
    """

    config: str | None = None
    small: str | None = None
    library: str | None = None
    grid: tuple[tuple[str, ...], ...] = ((),)


def _rates(*rates: float) -> tuple[tuple[str, ...], ...]:
    return tuple((f"training.learning_rate={rate}",) for rate in rates)


MODELS = {
    "flow": Entry("flow.yaml", small="pendulum_flow.yaml"),
    "flow, many-valued recipe": Entry("many_valued_flow.yaml"),
    "reference recipe": Entry("reference_flow.yaml"),
    "MLP regression, linear base": Entry("mlp.yaml", grid=_rates(4e-3, 8e-3)),
    "MLP regression": Entry("mlp_plain.yaml", grid=_rates(4e-3, 8e-3)),
    "Gaussian": Entry("gaussian.yaml", grid=_rates(4e-3, 8e-3)),
    "mixture density": Entry("mixture.yaml", grid=_rates(4e-3, 8e-3)),
    "nearest neighbours": Entry("nearest_neighbours.yaml", grid=(("num_neighbours=4",), ("num_neighbours=16",))),
    "boosted trees": Entry("trees.yaml"),
    "linear": Entry("linear.yaml"),
    "physical oracle": Entry("oracle.yaml"),
    "sbi NPE": Entry(library="npe", grid=(("5e-4",), ("2e-3",))),
    "sbi FMPE": Entry(library="fmpe", grid=(("5e-4",), ("2e-3",))),
    "torchcfm": Entry(library="torchcfm", grid=(("1e-3",), ("4e-3",))),
}


def slug(name: str) -> str:
    """Return a name for files.

    Example:
        >>> slug("MLP regression, linear base")
        'mlp-regression-linear-base'
    """
    return "-".join(name.replace(",", "").lower().split())


def main() -> None:
    """Run what is asked for and not there yet, then write the board."""
    args = parse_arguments()
    torch.set_num_threads(1)
    for name in args.problems if not args.only_page else ():
        store = problem(name, args.folder, args.episodes)
        for model in args.models:
            if not applies(model, name):
                continue
            if MODELS[model].library is not None and args.peers is None:
                print(f"{name}, {model}: left out, --peers is not given", flush=True)
                continue
            run_model(args, name, store, model)
    entries = {name: [model for model in MODELS if applies(model, name)] for name in PROBLEMS}
    print(f"written: {write_page(args.output, entries)}")


def applies(model: str, name: str) -> bool:
    """Return whether a model can be built for a problem: the oracle needs an exact inverse."""
    return MODELS[model].config != "oracle.yaml" or is_small(name)


def is_small(name: str) -> bool:
    """Return whether a problem is a pendulum."""
    return name.startswith("pendulum")


def run_model(args: argparse.Namespace, name: str, store: TransitionStore, model: str) -> None:
    """Choose hyperparameters, then train and judge every seed that has no result yet."""
    paths = {seed: result_path(args.output, name, model, seed) for seed in args.seeds}
    missing = [seed for seed, path in paths.items() if not is_done(path, args.budget, store)]
    if not missing:
        return
    overrides = choose(args, name, store, model)
    for seed in missing:
        rows = held_out(store, "test")
        predictions, trained = train_and_predict(args, name, store, model, overrides, args.budget, seed, rows)
        values = {
            "problem": name,
            "model": model,
            "seed": seed,
            "budget_s": args.budget,
            **trained,
            "chosen": list(overrides),
            "dataset_hash": store.content_hash,
            **judge(predictions, rows, seed),
            "machine": machine(),
        }
        write_json(paths[seed], values, indent=1)
        print(
            f"{name}, {model}, seed {seed}: energy score {values['energy_score']:.4g}, "
            f"{trained['cpu_s']:.1f} CPU-seconds",
            flush=True,
        )


def choose(args: argparse.Namespace, name: str, store: TransitionStore, model: str) -> tuple[str, ...]:
    """Return the overrides with the lowest energy score on validation rows; tried once, then read from their file."""
    grid = MODELS[model].grid
    path = args.output / "choices" / name / f"{slug(model)}.json"
    if len(grid) == 1:
        return grid[0]
    budget_s = args.budget * CHOICE_SHARE
    if is_done(path, budget_s, store):
        return tuple(json.loads(path.read_text(encoding="utf-8"))["chosen"])
    rows = held_out(store, "val")
    tried = []
    for overrides in grid:
        predictions, trained = train_and_predict(
            args, name, store, model, overrides, args.budget, CHOICE_SEED, rows, CHOICE_SHARE
        )
        tried.append({"overrides": list(overrides), "energy_score": chosen_by(predictions, rows), **trained})
    # NaN is never the lowest.
    chosen = min(tried, key=lambda each: np.nan_to_num(each["energy_score"], nan=np.inf))["overrides"]
    values = {"chosen": chosen, "tried": tried, "budget_s": budget_s, "dataset_hash": store.content_hash}
    write_json(path, values, indent=1)
    return tuple(chosen)


def train_and_predict(
    args: argparse.Namespace,
    name: str,
    store: TransitionStore,
    model: str,
    overrides: Sequence[str],
    budget_s: float,
    seed: int,
    rows: Rows,
    share: float = 1.0,
) -> tuple[Predictions, dict[str, Any]]:
    """Train one model; return its predictions and what its training took."""
    entry = MODELS[model]
    with tempfile.TemporaryDirectory(prefix="invdyn-leaderboard-") as folder:
        if entry.library is not None:
            return run_peer(args.peers, entry.library, overrides[0], store, share * budget_s, seed, rows, Path(folder))
        assert entry.config is not None
        file = entry.small if entry.small and is_small(name) else entry.config
        config = load_model_config(ROOT / "configs" / "inverse_dynamics" / file, overrides)
        config = parse_model_config({**config.to_values(), TARGET_KEY: config.target, "name": slug(model)}, model)
        # The reference recipe is its loop too.
        compiled = not args.eager and entry.config != "reference_flow.yaml"
        trained = train_within(config, store, budget_s, seed, Path(folder), compiled=compiled, share=share)
        costs = {"cpu_s": trained.cpu_s, "epochs": trained.epochs, "compile_cpu_s": trained.compile_cpu_s}
        return predict(trained.model, rows, seed), costs


def run_peer(
    python: Path, library: str, rate: str, store: TransitionStore, budget_s: float, seed: int, rows: Rows, folder: Path
) -> tuple[Predictions, dict[str, Any]]:
    """Let another library train on the same rows in its own environment; arrays go there and back as .npz."""
    train = store.load("train", columns=("state", "action", "next_state"))
    features = transition_features(train["state"], train["next_state"])
    action = train["action"].reshape(len(features), -1).astype(np.float64)
    arrays = {"features": features, "action": action, "test_features": rows.features, "test_action": rows.action}
    np.savez(folder / "in.npz", **arrays)
    flags = {
        "library": library,
        "arrays": folder / "in.npz",
        "output": folder / "out.npz",
        "budget_s": budget_s,
        "learning_rate": rate,
        "num_samples": rows.num_samples,
        "seed": seed,
    }
    command = [str(python.absolute()), str(Path(__file__).resolve().with_name("peers.py"))]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    subprocess.run(command, check=True, timeout=PEER_TIMEOUT_S, cwd=folder)  # sbi writes logs where it runs
    found: dict[str, Any] = dict(np.load(folder / "out.npz"))
    predictions = Predictions(
        samples=found["samples"].astype(np.float64),
        log_prob=found.get("log_prob"),
        network_evaluations=int(found["network_evaluations"]),
        us_per_action=float(found["us_per_action"]),
    )
    return predictions, {"cpu_s": float(found["cpu_s"]), "epochs": int(found["epochs"]), "compile_cpu_s": 0.0}


def is_done(path: Path, budget_s: float, store: TransitionStore) -> bool:
    """Return whether a file holds what was found with this budget on these rows; anything else is made anew."""
    if not path.exists():
        return False
    values = json.loads(path.read_text(encoding="utf-8"))
    return (values["budget_s"], values["dataset_hash"]) == (budget_s, store.content_hash)


def result_path(output: Path, name: str, model: str, seed: int) -> Path:
    """Return the file of one result."""
    return output / "results" / name / slug(model) / f"seed-{seed}.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=_names(PROBLEMS), default=PROBLEMS, help="comma-separated (default: all)")
    parser.add_argument(
        "--models", type=_names(tuple(MODELS)), default=tuple(MODELS), help="separated by semicolons (default: all)"
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="CPU seconds of training (default: %(default)s)")
    parser.add_argument("--peers", type=Path, help="Python of the environment with sbi and torchcfm")
    parser.add_argument("--folder", type=Path, default=ROOT / "data", help="of the datasets (default: data/)")
    parser.add_argument("--episodes", type=int, help="episodes to record (default: the dataset config's)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: docs/leaderboard")
    parser.add_argument("--eager", action="store_true", help="do not compile (where there is no compiler)")
    parser.add_argument("--only_page", action="store_true", help="write the board of the results that are there")
    return parser.parse_args()


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(";" if ";" in text or "," in "".join(known) else ","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"must be of {'; '.join(known)}, got {unknown[0]!r}")
        return names

    return parse


if __name__ == "__main__":
    main()
