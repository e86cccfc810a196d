"""Extract transitions from a recording: plan on the driver, one task per segment, manifest last.

Each task reads its own slice of the recording, writes its part files itself and returns a small record; no array
crosses the object store. A record is also kept on disk, so that a run that was killed continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdyn import storage
from invdyn.errors import ConfigError, DataError, StorageError
from invdyn.nodes import SharedFiles, shared_files, watching_nodes
from invdyn.range_file import hdf5_source
from invdyn.sequences.base import SequencePlan, SequenceReader
from invdyn.sequences.registry import open_sequences
from invdyn.transitions.damage import DamagedFiles, find_damaged
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.filters import (
    select_episodes,
)
from invdyn.transitions.manifest import extraction_config, make_manifest
from invdyn.transitions.output_folder import check_output, finish, open_output, save_record, segment_key
from invdyn.transitions.plan import (
    SPLITS,
    ExtractionPlan,
    PerEpisode,
    Segment,
    cut_segments,
    episodes_with_rows,
    kept_episodes,
    make_plan,
)
from invdyn.transitions.scan import (
    RunTasks,
    Scan,
    Task,
    count_scans,
    scan_recording,
)
from invdyn.transitions.segment import extract_segment
from invdyn.transitions.store import (
    COLUMNS,
    SCHEMA_VERSION,
    TransitionStore,
)
from invdyn.transitions.windows import Window

if TYPE_CHECKING:
    import ray.data


SCHEDULING_TIMEOUT = "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S"

Record = dict[str, Any]
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Listener:
    """What is told while a dataset is made, for progress bars; each does nothing by default.

    Attributes:
        on_scan: called with the number of tasks that look at the recording for the filters, before the first; not
            where no filter needs it or an earlier run did it.
        on_scanned: called when one of them is done.
        on_plan: called with each plan, when all that can be checked beforehand is. Nothing is written before the first.
        on_rows: called with the number of rows done: first those of an earlier run, then of each finished segment.
        on_skip: called with the files found to be damaged, and the reason of each, before it is planned without them.
        on_fault: called with a line that says what happened to a node, or to an earlier run, and what is done.
    """

    on_scan: Callable[[int], None] = lambda tasks: None
    on_scanned: Callable[[], None] = lambda: None
    on_plan: Callable[[ExtractionPlan], None] = lambda plan: None
    on_rows: OnRows = lambda rows: None
    on_skip: Callable[[Mapping[str, str]], None] = lambda files: None
    on_fault: Callable[[str], None] = lambda line: None


def create_dataset(
    config: DatasetConfig,
    *,
    max_samples: int | None = None,
    overwrite: bool = False,
    local: bool = False,
    num_workers: int | None = None,
    listener: Listener = Listener(),
) -> TransitionStore:
    """Extract the transitions of a recording into `config.transitions_path`.

    The rows, their order and the statistics do not depend on `local` or `num_workers`. A run that was killed continues
    when it is called again with the same arguments. With `format_options: {on_error: skip}` a file that turns out to be
    damaged is left out, and all is planned again: the dataset is the one of the recording without that file.

    Args:
        config: the dataset.
        max_samples: exact number of rows of all splits together; all rows when None or more than there are.
        overwrite: replace a finished dataset, once the new one is whole, or one that another plan left unfinished.
        local: work in this process instead of on Ray (which must otherwise be initialised).
        num_workers: tasks at a time; as many as Ray has CPUs when None.
        listener: what is told on the way.

    Raises:
        ConfigError: when a path is not where workers reach it.
        DataError: when the recording is unusable, the folder holds another dataset, or writing fails.
        StorageError: when a storage service refuses or does not answer.
    """
    output = config.transitions_path
    check_apart(config)
    if not local:
        check_paths(config)
    reader = open_sequences(
        config.sequence_path,
        format_name=config.format,
        state_keys=config.state_keys,
        action_key=config.shape_meta.action_key if config.shape_meta else None,
        options=config.format_options,
    )
    sequences = reader.inspect()
    check_shapes(config, sequences)
    plan_hash = hash_plan(config, sequences, max_samples)
    # What cannot be planned is told before the recording is read, or a folder refused.
    plan_before_scan = partial(_plan, config, max_samples=None if config.filters.needs_scan else max_samples)
    plan = plan_before_scan(sequences)
    job = check_output(output, plan_hash, overwrite)
    source = [file.path for file in sequences.files[:1] if storage.is_file(file.path)]
    damaged, resume = dict(job.damaged), job.resume
    with ExitStack() as asked:
        # Not before the first plan is told, which is when the caller starts Ray.
        @cache
        def reach() -> SharedFiles:
            files = asked.enter_context(shared_files(job.folder, source, {"CPU": 1}))
            asked.enter_context(watching_nodes(listener.on_fault, "its unfinished parts are made again on others"))
            return files

        run = partial(_run, reader=reader, num_workers=num_workers, reach=None if local else reach)
        while True:
            if damaged:
                sequences = reader.inspect(damaged)
                plan = plan_before_scan(sequences)
            try:
                scan = _scan(config, reader, sequences, job.saved_scan(damaged), run, listener)
                if config.filters.needs_scan:
                    plan = _plan(config, sequences, max_samples=max_samples, row_drops=scan.row_drops)
                listener.on_plan(plan)
                if not local:
                    reach()
                done = open_output(job, plan.segments, scan, damaged, resume=resume)
                if job.resume and done:
                    listener.on_fault(f"an earlier run was cut off: {len(done)} of {len(plan.segments)} parts are kept")
                resume = True
                records = _extract(reader, plan, scan, job.folder, done, run, listener.on_rows)
                break
            except DamagedFiles as found:
                if not found.files.keys() - damaged.keys():
                    raise  # the reader read a file that it was told to leave out
                damaged |= found.files
                listener.on_skip(found.files)
    check_parts(job.folder, records)
    finish(job, make_manifest(config, plan, scan, records, max_samples), records)
    return TransitionStore(output)


def read_transitions(path: str | Path, split: str = "train") -> ray.data.Dataset:
    """Return a split as a Ray Data dataset with tensor columns, one block per part.

    Args:
        path: the transitions folder, or its URL.
        split: train, val or test.

    Raises:
        DataError: when the dataset is missing or unfinished.
    """
    import ray.data

    store = TransitionStore(path)
    storage.check_shared("path", store.path)
    files = [{"file": storage.join(storage.absolute(store.path), part.file)} for part in store.parts(split)]
    variables = storage.environment()

    def load(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import h5py

        storage.set_environment(variables)
        with h5py.File(hdf5_source(str(batch["file"][0])), "r") as file:
            return {column: file[column][()] for column in COLUMNS}

    return ray.data.from_items(files, override_num_blocks=max(len(files), 1)).map_batches(load, batch_size=1)


def check_paths(config: DatasetConfig) -> None:
    """Check that workers can reach the recording and the transitions.

    Raises:
        ConfigError: when one of them is in the memory of this process.
    """
    storage.check_shared("buffer_path", config.sequence_path)
    storage.check_shared("output_path", config.transitions_path)


def check_apart(config: DatasetConfig) -> None:
    """Check that the transitions are not written into the recording's own folder.

    Raises:
        ConfigError: when they would be.
    """
    recording, output = (
        path.rstrip("/") if storage.is_url(path) else os.path.realpath(path)
        for path in (config.sequence_path, config.transitions_path)
    )
    if recording == output:
        raise ConfigError(f"output_path must be another folder than the recording's, got {output} for both; change it")


def check_shapes(config: DatasetConfig, sequences: SequencePlan) -> None:
    """Check the widths that `shape_meta` states against the recording.

    Raises:
        DataError: when they differ.
    """
    meta = config.shape_meta
    if meta is None:
        return
    stated = {
        "state": [None if key.shape is None else int(np.prod(key.shape)) for key in meta.obs.values()],
        "action": [None if meta.action.shape is None else int(np.prod(meta.action.shape))],
    }
    for name, found in (("state", sequences.state_dim), ("action", sequences.action_dim)):
        widths = stated[name]
        if None not in widths and sum(width or 0 for width in widths) != found:
            raise DataError(
                f"shape_meta must match the recording: {name} is stated as {sum(w or 0 for w in widths)} numbers, "
                f"{config.sequence_path} has {found}"
            )


def hash_plan(config: DatasetConfig, sequences: SequencePlan, max_samples: int | None) -> str:
    """Return a hash of all that decides which rows go where."""
    lengths = np.stack([sequences.num_states, sequences.num_actions, sequences.episode_index])
    facts = {
        "schema_version": SCHEMA_VERSION,
        "config": extraction_config(config),
        "state_keys": config.state_keys,  # as a list: their order is lost in a sorted mapping
        "max_samples": max_samples,
        "files": [(file.name, file.size, file.version) for file in sequences.files],
        "lengths": hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_parts(output: str, records: Iterable[Record]) -> None:
    """Check that every part is where this process sees it.

    Raises:
        DataError: naming the first that is not: workers then write to another disk.
    """
    found = {f"{split}/{name}" for split in SPLITS for name in storage.list_names(storage.join(output, split))}
    for record in records:
        for part in record["parts"].values():
            if part["file"] not in found:
                raise DataError(
                    f"part is missing after it was written: {storage.join(output, part['file'])}; on a cluster, the "
                    "output folder must be a URL or on a disk that all nodes share"
                )


def _plan(
    config: DatasetConfig,
    sequences: SequencePlan,
    *,
    max_samples: int | None,
    row_drops: Mapping[str, PerEpisode] | None = None,
) -> ExtractionPlan:
    return make_plan(
        sequences,
        Window(config.gap, config.horizon, config.history),
        dataset_name=config.name,
        val_ratio=config.val_ratio,
        test_ratio=config.test_ratio,
        recorded_splits=config.splits == "recorded",
        max_samples=max_samples,
        segment_bytes=_segment_bytes(config),
        episode_drops=select_episodes(config.filters, sequences),
        row_drops=row_drops,
    )


def _scan(
    config: DatasetConfig,
    reader: SequenceReader,
    sequences: SequencePlan,
    saved: Scan | None,
    run: RunTasks,
    listener: Listener,
) -> Scan:
    """Return what the filters come to, from an earlier run where it got so far."""
    if saved is not None:
        return saved
    window = Window(config.gap, config.horizon, config.history)
    keep = kept_episodes(sequences, select_episodes(config.filters, sequences))
    keep = episodes_with_rows(sequences, window, keep)
    segments = cut_segments(sequences, keep.astype(np.int64), keep.astype(np.int64), _segment_bytes(config), keep)
    if config.filters.needs_scan:
        listener.on_scan(count_scans(config.filters, len(segments)))

    def run_counted(task: Task, some: Sequence[Segment]) -> Iterator[Record]:
        for record in run(task, some):
            listener.on_scanned()
            yield record

    return scan_recording(config.filters, reader, window, sequences, keep, segments, run_counted)


def _extract(
    reader: SequenceReader,
    plan: ExtractionPlan,
    scan: Scan,
    folder: str,
    done: dict[int, Record],
    run: RunTasks,
    on_rows: OnRows,
) -> list[Record]:
    """Extract the segments that are not done, and return the records of all in plan order."""
    on_rows(sum(_rows_of(record) for record in done.values()))
    todo = [segment for segment in plan.segments if segment.index not in done]
    keys = {segment.index: segment_key(segment, scan) for segment in todo}
    extract = partial(extract_segment, reader, plan.window, folder, scan.row_filter)
    for record in run(partial(_extract_and_save, extract, folder, keys), todo):
        done[record["index"]] = record
        on_rows(_rows_of(record))
    return [done[segment.index] for segment in plan.segments]


def _extract_and_save(extract: Task, folder: str, keys: Mapping[int, str], segment: Segment) -> Record:
    record = {**extract(segment), "key": keys[segment.index]}
    save_record(folder, record)
    return record


def _segment_bytes(config: DatasetConfig) -> int:
    return int(config.part_size_mb * 2**20)


def _run(
    task: Task,
    segments: Sequence[Segment],
    *,
    reader: SequenceReader,
    num_workers: int | None,
    reach: Callable[[], SharedFiles] | None,
) -> Iterator[Record]:
    """Run a task for each segment, on Ray where `reach` tells what its nodes must see; yield the records as they come.

    Raises:
        ConfigError: when a node does not reach the recording or the dataset's folder.
        DamagedFiles: after the last one, when damaged files are skipped: all of them that the tasks met.
        DataError: the first that a task met.
    """
    answer = partial(_record_or_error, reader, task)
    records = map(answer, segments) if reach is None else _run_on_ray(answer, segments, num_workers, reach())
    damaged: dict[int, dict[str, str]] = {}
    for record in records:
        if record.get("damaged"):
            damaged[record["index"]] = record["damaged"]
        elif "error" in record:
            raise DataError(record["error"])
        else:
            yield record
    if damaged:
        in_order = [damaged[index] for index in sorted(damaged, reverse=True)]
        raise DamagedFiles({path: reason for files in in_order for path, reason in files.items()})


def _run_on_ray(
    task: Task, segments: Sequence[Segment], num_workers: int | None, files: SharedFiles
) -> Iterator[Record]:
    """Map the segments with Ray Data, one block each, and yield the records as they come."""
    if not segments:
        return
    import ray.data

    _schedule_quickly()
    by_index = {segment.index: segment for segment in segments}
    at_once = num_workers and min(num_workers, len(segments))

    def run(row: dict[str, Any]) -> dict[str, str]:
        segment = by_index[row["segment"]]
        problem = files.problem_here()
        record = {"index": segment.index, "error": problem} if problem else task(segment)
        return {"record": json.dumps(record)}

    dataset = ray.data.from_items([{"segment": index} for index in by_index], override_num_blocks=len(segments))
    for row in dataset.map(run, num_cpus=1, concurrency=at_once).iter_rows():
        yield json.loads(row["record"])


def _schedule_quickly() -> None:
    """Let Ray Data look for finished tasks every 20 ms: with its 100 ms a worker waits 0.14 s for its next task."""
    from ray.data._internal.execution import streaming_executor_state as state

    if hasattr(state, SCHEDULING_TIMEOUT):  # Ray's own business, so it may go; a test says when it does
        setattr(state, SCHEDULING_TIMEOUT, 0.02)


def _record_or_error(reader: SequenceReader, task: Task, segment: Segment) -> Record:
    # Bad data is an answer, not a fault of the worker: raised there, Ray would retry and wrap it.
    try:
        try:
            return task(segment)
        except DataError as error:
            damaged = find_damaged(reader, segment.sequences, segment.keep) if reader.skips_damaged else {}
            return {"index": segment.index, "error": str(error), "damaged": damaged}
    except StorageError as error:
        return {"index": segment.index, "error": str(error)}  # whatever it said before, nothing is known of the data


def _rows_of(record: Record) -> int:
    return sum(int(part["rows"]) for part in record["parts"].values())
