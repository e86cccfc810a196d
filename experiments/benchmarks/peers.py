"""Other libraries on the same rows: run by leaderboard.py with the Python of an environment that has them.

Needs torch, numpy and the library; nothing of invdyn. Reads an .npz with features, action, test_features and
test_action; writes an .npz with samples, log_prob where the library has it, and what training and sampling cost.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

EULER_STEPS = 20
FEWEST_EPOCHS = 2
PROBE_SHARE = 5
TIMED_ROWS, TIMED_CALLS = 1_000, 3
BATCH_SIZE = 256
WIDTH = 64
SAMPLE_CHUNK_ROWS = 500
LIBRARIES = ("npe", "fmpe", "torchcfm")


def cpu_seconds() -> float:
    """Return the CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Peer:
    """A library's model: trained by `train`, then asked by `sample`."""

    network_evaluations = 1

    def train(self, features: Tensor, action: Tensor, budget_s: float, rate: float) -> tuple[int, float]:
        """Train for about the CPU time; return the number of epochs and the CPU seconds of the training alone."""
        raise NotImplementedError

    def sample(self, features: Tensor, num_samples: int) -> Tensor:
        """Return (num_samples, rows, action_dim)."""
        raise NotImplementedError

    def log_prob(self, features: Tensor, action: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return (rows,) nats, or None."""
        return None


class SbiPeer(Peer):
    """sbi's NPE (a neural spline flow, its default family for few dimensions) or FMPE, with its own training loop."""

    def __init__(self, kind: str) -> None:
        from sbi import inference, utils

        self.kind, self.library, self.make_prior = kind, inference, utils.BoxUniform

    def train(self, features: Tensor, action: Tensor, budget_s: float, rate: float) -> tuple[int, float]:
        """Train for as many epochs as fit; the speed is probed by a short training on a share of the rows."""
        rows = len(features) // PROBE_SHARE
        started = cpu_seconds()
        self._fit(features[:rows], action[:rows], rate, FEWEST_EPOCHS)
        per_epoch = PROBE_SHARE * (cpu_seconds() - started) / FEWEST_EPOCHS
        epochs = max(FEWEST_EPOCHS, int(budget_s / per_epoch))
        started = cpu_seconds()
        self.estimator = self._fit(features, action, rate, epochs)
        return epochs, cpu_seconds() - started

    def _fit(self, features: Tensor, action: Tensor, rate: float, epochs: int) -> Any:
        self.dims = action.shape[1]
        # Wide enough for every action: the prior only bounds samples.
        margin = 0.05 * (action.amax(0) - action.amin(0))
        prior = self.make_prior(action.amin(0) - margin, action.amax(0) + margin)
        if self.kind == "npe":
            self.inference = self.library.NPE(prior=prior, density_estimator="nsf", show_progress_bars=False)
        else:
            self.inference = self.library.FMPE(prior=prior, show_progress_bars=False)
        return self.inference.append_simulations(action, features).train(
            training_batch_size=BATCH_SIZE,
            learning_rate=rate,
            max_num_epochs=epochs - 1,  # sbi trains one more
            stop_after_epochs=10**6,
        )

    def sample(self, features: Tensor, num_samples: int) -> Tensor:
        """Return samples of sbi's estimator."""
        if self.kind == "npe":
            return self.estimator.sample((num_samples,), condition=features)
        # sbi's own sampler takes an adaptive solver, minutes for these rows; its time runs from 1 (noise) to 0.
        self.network_evaluations = EULER_STEPS
        condition = features.repeat(num_samples, 1)
        x = torch.randn(len(condition), self.dims)
        for step in range(EULER_STEPS):
            t = torch.full((len(x),), 1.0 - step / EULER_STEPS)
            x = x - self.estimator.ode_fn(x, condition, t) / EULER_STEPS
        return x.view(num_samples, len(features), self.dims)

    def log_prob(self, features: Tensor, action: Tensor) -> Tensor | None:
        """Return NPE's density; FMPE's needs an integration per row that takes longer than the training."""
        if self.kind != "npe":
            return None
        return self.estimator.log_prob(action[None], condition=features)[0]


class TorchCfmPeer(Peer):
    """torchcfm's ConditionalFlowMatcher and MLP, with the loop of its examples: Adam, Euler steps."""

    network_evaluations = EULER_STEPS

    def __init__(self) -> None:
        from torchcfm import conditional_flow_matching
        from torchcfm.models import models

        self.make_matcher, self.make_network = conditional_flow_matching.ConditionalFlowMatcher, models.MLP

    def train(self, features: Tensor, action: Tensor, budget_s: float, rate: float) -> tuple[int, float]:
        """Train until the CPU time is used up."""
        self.dims = action.shape[1]
        width = features.shape[1] + self.dims
        self.network = self.make_network(dim=width, out_dim=self.dims, w=WIDTH, time_varying=True)
        matcher = self.make_matcher(sigma=0.0)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=rate)
        started, steps = cpu_seconds(), 0
        while cpu_seconds() - started < budget_s:
            rows = torch.randint(len(action), (BATCH_SIZE,))
            x_1 = action[rows]
            t, x_t, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x_1), x_1)
            predicted = self.network(torch.cat([x_t, features[rows], t[:, None]], dim=1))
            loss = torch.nn.functional.mse_loss(predicted, velocity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        return steps * BATCH_SIZE // len(action), cpu_seconds() - started

    def sample(self, features: Tensor, num_samples: int) -> Tensor:
        """Return samples by Euler steps."""
        condition = features.expand(num_samples, -1, -1)
        x = torch.randn(num_samples, len(features), self.dims)
        for step in range(EULER_STEPS):
            t = torch.full((*x.shape[:2], 1), step / EULER_STEPS)
            x = x + self.network(torch.cat([x, condition, t], dim=2)) / EULER_STEPS
        return x


def main() -> None:
    """Train, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    for name, kind in {"budget_s": float, "learning_rate": float, "num_samples": int, "seed": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    arrays = {name: torch.from_numpy(values) for name, values in np.load(args.arrays).items()}
    mean, std = arrays["features"].mean(0), arrays["features"].std(0).clamp(min=1e-12)
    features, test = (((arrays[name] - mean) / std).float() for name in ("features", "test_features"))
    scale, offset = arrays["action"].std(0).clamp(min=1e-12), arrays["action"].mean(0)
    action, test_action = (((arrays[name] - offset) / scale).float() for name in ("action", "test_action"))
    peer = TorchCfmPeer() if args.library == "torchcfm" else SbiPeer(args.library)
    epochs, cpu_s = peer.train(features, action, args.budget_s, args.learning_rate)
    found: dict[str, Any] = {"cpu_s": cpu_s, "epochs": epochs}
    with torch.no_grad():
        chunks = [peer.sample(chunk, args.num_samples) for chunk in test.split(SAMPLE_CHUNK_ROWS)]
        found["samples"] = (torch.cat(chunks, dim=1).double() * scale + offset).numpy()
        found["us_per_action"] = 1e6 * _cpu_per_call(lambda: peer.sample(test[:TIMED_ROWS], 1)) / len(test[:TIMED_ROWS])
        log_prob = peer.log_prob(test, test_action)
    if log_prob is not None:
        found["log_prob"] = (log_prob.double() - scale.log().sum()).numpy()
    np.savez(args.output, network_evaluations=peer.network_evaluations, **found)


def _cpu_per_call(call: Callable[[], object]) -> float:
    times = []
    for _ in range(TIMED_CALLS + 1):
        started = cpu_seconds()
        call()
        times.append(cpu_seconds() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
