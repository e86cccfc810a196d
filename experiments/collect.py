"""Record sequences in simulation: python experiments/collect.py --config configs/dataset/pendulum_integrable.yaml."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator

from common import add_common_arguments, connect, load_dataset_config, plan_tasks, run_command

from invdyn.envs.collect_config import CollectConfig
from invdyn.envs.rollout import EpisodeRecorder, ShardRecord, collect_shard
from invdyn.envs.shards import close_folder, open_folder
from invdyn.errors import ConfigError, InvdynError
from invdyn.nodes import SharedFiles, shared_files
from invdyn.progress import Progress, format_duration
from invdyn.transitions.dataset_config import DatasetConfig

SMOKE_EPISODES, SMOKE_EPISODES_PER_SHARD, SMOKE_STEPS = 128, 64, 100


def main() -> None:
    """Record what a dataset config's `collect` section says into its `buffer_path`."""
    args = parse_arguments()
    dataset = load_dataset_config(args.config, args.storage, args.overrides)
    config = collect_section(dataset, args)
    EpisodeRecorder(config).close()  # every check of the config, before anything is written or started
    print(
        record(
            dataset,
            config,
            overwrite=args.overwrite,
            local=args.local,
            num_workers=args.num_workers,
            start=lambda: connect(args, plan_tasks(args.num_workers)),
        )
    )


def record(
    dataset: DatasetConfig,
    config: CollectConfig,
    *,
    overwrite: bool = False,
    local: bool = False,
    num_workers: int | None = None,
    start: Callable[[], None] = lambda: None,
) -> str:
    """Record a dataset's sequences with a progress bar, and return a summary.

    Args:
        dataset: says where.
        config: says what.
        overwrite: remove the shards of an earlier recording first.
        local: in this process, without Ray.
        num_workers: shards at a time on Ray.
        start: connects to Ray; called once the folder is known to be usable.

    Raises:
        DataError: when the folder holds another recording, or cannot be written.
    """
    folder = dataset.sequence_path
    pending = open_folder(folder, config, overwrite)
    num_finished = config.num_shards - len(pending)
    if num_finished:
        print(f"continuing: {num_finished} of {config.num_shards} shards are there already", file=sys.stderr)
    if pending:
        start()
    num_done = sum(len(config.episodes_of(index)) for index in range(config.num_shards) if index not in set(pending))
    with Progress(config.num_episodes, f"collect {dataset.name}", "episodes", done=num_done) as progress:
        run = record_here if local else functools.partial(record_on_ray, num_workers=num_workers)
        records = list(run(config, folder, pending, progress))
    close_folder(folder, config)
    return summary(records, config, folder, progress.elapsed_s)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="YAML", help="dataset config with a collect section")
    parser.add_argument("--overwrite", action="store_true", help="remove the shards of an earlier recording first")
    add_common_arguments(parser)
    return parser.parse_args()


def collect_section(dataset: DatasetConfig, args: argparse.Namespace) -> CollectConfig:
    """Return what to record, shrunk by --smoke.

    Raises:
        ConfigError: when the dataset config has no `collect` section.
    """
    if dataset.collect is None:
        raise ConfigError(f"{args.config} must have a collect section to be recorded in simulation; it has none")
    if not args.smoke:
        return dataset.collect
    return dataset.collect.replace(
        num_episodes=min(dataset.collect.num_episodes, SMOKE_EPISODES),
        episodes_per_shard=min(dataset.collect.episodes_per_shard, SMOKE_EPISODES_PER_SHARD),
        max_episode_steps=min(dataset.collect.max_episode_steps, SMOKE_STEPS),
    )


def record_here(config: CollectConfig, folder: str, pending: list[int], progress: Progress) -> Iterator[ShardRecord]:
    """Record shards one after another in this process."""
    num_steps = 0

    def count(steps: int) -> None:
        nonlocal num_steps
        num_steps += steps
        progress.update(1, step_rate(num_steps, progress.elapsed_s))

    for index in pending:
        yield collect_shard(config, folder, index, count)


def record_on_ray(
    config: CollectConfig, folder: str, pending: list[int], progress: Progress, num_workers: int | None
) -> Iterator[ShardRecord]:
    """Record shards as Ray tasks, at most `num_workers` at a time (default: as many as the cluster has, or gets, CPUs).

    Raises:
        ConfigError: when a node does not reach the folder.
        DataError: when a shard cannot be written.
    """
    if not pending:
        return
    import ray

    def record_shard(files: SharedFiles, index: int) -> ShardRecord:
        files.check_here()
        return collect_shard(config, folder, index)

    task = ray.remote(num_cpus=1)(record_shard)
    limit = num_workers or len(pending)  # Ray queues them: an autoscaler sees what they need
    waiting, running, num_steps = list(reversed(pending)), [], 0
    with shared_files(folder, [], {"CPU": 1}) as files:
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    running.append(task.remote(files, waiting.pop()))
                finished, running = ray.wait(running, num_returns=1)
                for reference in finished:
                    record = ray.get(reference)
                    num_steps += record.num_steps
                    progress.update(record.num_episodes, step_rate(num_steps, progress.elapsed_s))
                    yield record
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InvdynError):
                raise error.cause from None
            raise
        finally:
            for reference in running:
                ray.cancel(reference)


def step_rate(num_steps: int, elapsed_s: float) -> str:
    """Return the speed in words."""
    return f"{num_steps / max(elapsed_s, 1e-9):,.0f} env steps/s"


def summary(records: list[ShardRecord], config: CollectConfig, folder: str, elapsed_s: float) -> str:
    """Return what was recorded, and what the user should know about it."""
    num_episodes = sum(record.num_episodes for record in records)
    num_steps = sum(record.num_steps for record in records)
    speed = f"{format_duration(elapsed_s)} ({step_rate(num_steps, elapsed_s)})"
    lines = [
        f"recorded {num_episodes} episodes, {num_steps} transitions in {speed}",
        f"{config.num_shards} shards in {folder}",
    ]
    num_retries = sum(record.num_retries for record in records)
    if num_retries:
        lines.append(f"{num_retries} starts had no step inside state_limits and were drawn again")
    num_limit_states = sum(record.num_limit_states for record in records)
    if num_limit_states:
        lines.append(
            f"note: {num_limit_states} states touch joint limits, where actions are hard to recover; "
            "collect.state_limits ends episodes before them"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
