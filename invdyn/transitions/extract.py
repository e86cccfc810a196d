"""Extract transitions from a recording: plan on the driver, one task per segment, manifest last.

Each task reads its own slice of the recording, writes its part files itself and returns a small record; no array
crosses the object store. A record is also kept on disk, so that a run that was killed continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from invdyn.errors import ConfigError, DataError
from invdyn.sequences.base import EpisodeArrays, SequencePlan, SequenceReader
from invdyn.sequences.registry import open_sequences
from invdyn.statistics import Moments
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.filters import (
    RowFilter,
    count_clipped,
    drop_masks,
    first_of_each,
    select_episodes,
    stored_arrays,
)
from invdyn.transitions.manifest import extraction_config, make_manifest
from invdyn.transitions.plan import (
    SPLITS,
    TRAIN,
    Episodes,
    ExtractionPlan,
    PerEpisode,
    Segment,
    cut_segments,
    kept_episodes,
    make_plan,
)
from invdyn.transitions.scan import Task, kept_lengths, read_episodes, scan_recording
from invdyn.transitions.store import (
    COLUMNS,
    MANIFEST,
    SCHEMA_VERSION,
    TEMPORARY_SUFFIX,
    Part,
    TransitionStore,
    holds_rows,
    part_name,
    write_json,
    write_part,
)
from invdyn.transitions.windows import Transitions, Window, make_transitions

if TYPE_CHECKING:
    import ray.data

PROGRESS_FOLDER = ".progress"
PLAN_FILE = "plan.json"
OUR_PART = re.compile(rf"\.?part-\d{{5,}}\.h5(\.\d+{re.escape(TEMPORARY_SUFFIX)})?")
HASH_CHUNK_BYTES = 8 * 2**20

Record = dict[str, Any]
OnRows = Callable[[int], None]


def create_dataset(
    config: DatasetConfig,
    *,
    max_samples: int | None = None,
    overwrite: bool = False,
    local: bool = False,
    num_workers: int | None = None,
    on_scan: Callable[[], None] = lambda: None,
    on_plan: Callable[[ExtractionPlan], None] = lambda plan: None,
    on_rows: OnRows = lambda rows: None,
) -> TransitionStore:
    """Extract the transitions of a recording into `config.transitions_path`.

    The rows, their order and the statistics do not depend on `local` or `num_workers`. A run that was killed continues
    when it is called again with the same arguments.

    Args:
        config: the dataset.
        max_samples: exact number of rows of all splits together; all rows when None or more than there are.
        overwrite: replace a finished dataset, or one that another plan left unfinished.
        local: work in this process instead of on Ray (which must otherwise be initialised).
        num_workers: tasks at a time; as many as Ray has CPUs when None.
        on_scan: called before the recording is read for the filters; not where none needs it.
        on_plan: called once with the plan, when all that can be checked beforehand is, and before anything is written.
        on_rows: called with the number of rows done whenever a segment is finished.

    Raises:
        ConfigError: when a path is not on a mounted disk.
        DataError: when the recording is unusable, the folder holds another dataset, or writing fails.
    """
    check_paths(config)
    output = Path(config.transitions_path)
    reader = open_sequences(
        config.sequence_path,
        format_name=config.format,
        state_keys=config.state_keys,
        action_key=config.shape_meta.action_key if config.shape_meta else None,
        options=config.format_options,
    )
    sequences = reader.inspect()
    check_shapes(config, sequences)
    window = Window(config.gap, config.horizon, config.history)
    episode_drops = select_episodes(config.filters, sequences)
    planned = partial(_plan, config, sequences, window, episode_drops)
    plan = planned(max_samples=None if config.filters.needs_scan else max_samples)
    plan_hash = hash_plan(config, plan, max_samples)
    resume = check_output(output, plan_hash, overwrite)
    run = partial(_run, local=local, num_workers=num_workers)
    if config.filters.needs_scan:
        on_scan()
    keep = kept_episodes(sequences, episode_drops)
    whole = cut_segments(sequences, plan.split, keep.astype(np.int64), _segment_bytes(config), keep)
    scan = scan_recording(config.filters, reader, window, sequences, keep, partial(run, segments=whole))
    if config.filters.needs_scan:
        plan = planned(max_samples=max_samples, row_drops=scan.row_drops)
    on_plan(plan)
    done = open_output(output, plan_hash, resume)
    todo = [segment for segment in plan.segments if segment.index not in done]
    on_rows(sum(_rows_of(record) for record in done.values()))
    for record in run(partial(extract_segment, reader, window, output, scan.row_filter), todo):
        done[record["index"]] = record
        on_rows(_rows_of(record))
    records = [done[segment.index] for segment in plan.segments]
    check_parts(output, records)
    write_json(output / MANIFEST, make_manifest(config, plan, scan, records, max_samples), indent=1)
    _clear_progress(output)
    return TransitionStore(output)


def read_transitions(path: str | Path, split: str = "train") -> ray.data.Dataset:
    """Return a split as a Ray Data dataset with tensor columns, one block per part.

    Args:
        path: the transitions folder.
        split: train, val or test.

    Raises:
        DataError: when the dataset is missing or unfinished.
    """
    import ray.data

    store = TransitionStore(path)
    files = [{"file": str(store.path.resolve() / part.file)} for part in store.parts(split)]

    def load(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import h5py

        with h5py.File(str(batch["file"][0]), "r") as file:
            return {column: file[column][()] for column in COLUMNS}

    return ray.data.from_items(files, override_num_blocks=max(len(files), 1)).map_batches(load, batch_size=1)


def check_paths(config: DatasetConfig) -> None:
    """Check that the recording and the transitions are on mounted disks.

    Raises:
        ConfigError: when one of them is a URL.
    """
    for name, path in (("buffer_path", config.sequence_path), ("output_path", config.transitions_path)):
        if "://" in path:
            raise ConfigError(f"{name} must be a folder on a mounted disk, got {path!r}; mount or copy it")


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


def hash_plan(config: DatasetConfig, plan: ExtractionPlan, max_samples: int | None) -> str:
    """Return a hash of all that decides which rows go where."""
    lengths = np.stack([plan.sequences.num_states, plan.sequences.num_actions, plan.sequences.episode_index])
    facts = {
        "schema_version": SCHEMA_VERSION,
        "config": extraction_config(config),
        "state_keys": config.state_keys,  # as a list: their order is lost in a sorted mapping
        "max_samples": max_samples,
        "files": [(file.name, file.size, file.mtime_ns) for file in plan.sequences.files],
        "lengths": hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_output(output: Path, plan_hash: str, overwrite: bool) -> bool:
    """Return whether the output folder holds an earlier run of the same plan, to be continued.

    Raises:
        DataError: when the folder holds a finished dataset or another plan, and `overwrite` is not set.
    """
    finished = (output / MANIFEST).exists()
    plan_file = output / PROGRESS_FOLDER / PLAN_FILE
    started = plan_file.exists()
    same = started and _read_json(plan_file).get("plan_hash") == plan_hash
    if overwrite:
        return same and not finished
    # A run killed after its manifest, before it cleared its progress, is continued too: that only clears it.
    if finished and not same:
        raise DataError(f"dataset exists already: {output}; give --overwrite to replace it")
    if started and not same:
        raise DataError(
            f"{output} holds an unfinished dataset with another plan (config, --max_samples or recording changed); "
            "give --overwrite to replace it"
        )
    if not started and (parts := _our_files(output)):
        raise DataError(
            f"{output} holds parts of a dataset without {MANIFEST} ({len(parts)} files, first {parts[0].name}); give "
            "--overwrite to replace them"
        )
    return same


def open_output(output: Path, plan_hash: str, resume: bool) -> dict[int, Record]:
    """Prepare the output folder and return the records of finished segments: those of an earlier run, or none.

    Raises:
        DataError: when the folder cannot be written.
    """
    try:
        if not resume:
            _remove_dataset(output)
        for leftover in _our_files(output):
            if leftover.suffix == TEMPORARY_SUFFIX:
                leftover.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot clear {output}: {error}; check its permissions or set output_path") from None
    progress = output / PROGRESS_FOLDER
    write_json(progress / PLAN_FILE, {"plan_hash": plan_hash})
    records = [_read_json(path) for path in sorted(progress.glob("segment-*.json"))]
    return {record["index"]: record for record in records if record and _parts_whole(output, record)}


def check_parts(output: Path, records: Iterable[Record]) -> None:
    """Check that every part is on the disk that this process sees.

    Raises:
        DataError: naming the first that is not: workers then write to another disk.
    """
    for record in records:
        for part in record["parts"].values():
            if not (output / part["file"]).is_file():
                raise DataError(
                    f"part is missing after it was written: {output / part['file']}; on a cluster, the output folder "
                    "must be on a disk that all nodes share"
                )


def extract_segment(
    reader: SequenceReader, window: Window, output: Path, row_filter: RowFilter, segment: Segment
) -> Record:
    """Extract one segment: read, cut, check, write its parts, and return what the manifest needs of it.

    Raises:
        DataError: naming file, episode and step of bad values, or the part that could not be written.
    """
    arrays = read_episodes(reader, segment.sequences, segment.keep)
    record: Record = {"index": segment.index, "parts": {}, "moments": None}
    if row_filter.clip_to is not None:
        record["clipped_rows"] = 0
    for index, split in enumerate(SPLITS):
        limit = np.where(segment.split == index, segment.row_limit, 0)
        if not limit.any():
            continue
        rows = cut_rows(arrays, window, row_filter, segment, limit)
        if row_filter.clip_to is not None:
            num_actions = kept_lengths(segment)[1]
            act = (np.cumsum(num_actions) - num_actions)[rows.episode - segment.first_episode] + rows.step
            record["clipped_rows"] += count_clipped(row_filter.clip_to, arrays.action, act, window.horizon)
        name = part_name(split, segment.index)
        write_part(output / name, rows)
        record["parts"][split] = asdict(Part(name, len(rows), hash_rows(rows)))
        if index == TRAIN:
            record["moments"] = Moments.of_transitions(rows.state, rows.action, rows.next_state).to_json()
    record["sources"] = [
        {"name": file.name, "size": file.size, "xxh3_128": hash_files(reader.source_paths(file))}
        for file in (segment.sequences.files[i] for i in segment.hash_files)
    ]
    write_json(output / PROGRESS_FOLDER / f"segment-{segment.index:05d}.json", record)
    return record


def cut_rows(
    arrays: EpisodeArrays, window: Window, row_filter: RowFilter, segment: Segment, limit: PerEpisode
) -> Transitions:
    """Cut the first `limit` rows of each episode of a segment that no filter leaves out."""
    num_states, num_actions = kept_lengths(segment)
    stored = stored_arrays(row_filter, arrays)
    if not row_filter.drops_rows:
        return make_transitions(stored, window, num_states, num_actions, limit, segment.first_episode)
    available = window.num_rows(num_states, num_actions)
    masks = drop_masks(row_filter, arrays, window, num_states, num_actions)
    chosen = first_of_each(~np.logical_or.reduce(list(masks.values())), available, limit)
    wanted = np.where(limit > 0, available, 0)
    rows = make_transitions(stored, window, num_states, num_actions, wanted, segment.first_episode)
    chosen = chosen[np.repeat(limit > 0, available)]
    return Transitions(**{column: getattr(rows, column)[chosen] for column in COLUMNS})


def hash_rows(rows: Transitions) -> str:
    """Return the XXH3-128 of the columns' bytes, in `COLUMNS` order."""
    digest = xxhash.xxh3_128()
    for column in COLUMNS:
        digest.update(np.ascontiguousarray(getattr(rows, column)).data)
    return digest.hexdigest()


def hash_files(paths: Iterable[str]) -> str:
    """Return the XXH3-128 of the bytes of files, one after another."""
    digest = xxhash.xxh3_128()
    for path in paths:
        with Path(path).open("rb") as file:
            while block := file.read(HASH_CHUNK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _plan(
    config: DatasetConfig,
    sequences: SequencePlan,
    window: Window,
    episode_drops: Mapping[str, Episodes],
    *,
    max_samples: int | None,
    row_drops: Mapping[str, PerEpisode] | None = None,
) -> ExtractionPlan:
    return make_plan(
        sequences,
        window,
        dataset_name=config.name,
        val_ratio=config.val_ratio,
        test_ratio=config.test_ratio,
        recorded_splits=config.splits == "recorded",
        max_samples=max_samples,
        segment_bytes=_segment_bytes(config),
        episode_drops=episode_drops,
        row_drops=row_drops,
    )


def _segment_bytes(config: DatasetConfig) -> int:
    return int(config.part_size_mb * 2**20)


def _run(task: Task, segments: Sequence[Segment], *, local: bool, num_workers: int | None) -> Iterator[Record]:
    """Run a task for each segment and yield the records as they come.

    Raises:
        DataError: the first that a task met.
    """
    records = (_record_or_error(task, s) for s in segments) if local else _run_on_ray(task, segments, num_workers)
    for record in records:
        if "error" in record:
            raise DataError(record["error"])
        yield record


def _run_on_ray(task: Task, segments: Sequence[Segment], num_workers: int | None) -> Iterator[Record]:
    """Map the segments with Ray Data, one block each, and yield the records as they come."""
    if not segments:
        return
    import ray.data

    by_index = {segment.index: segment for segment in segments}

    def run(row: dict[str, Any]) -> dict[str, str]:
        return {"record": json.dumps(_record_or_error(task, by_index[row["segment"]]))}

    dataset = ray.data.from_items([{"segment": index} for index in by_index], override_num_blocks=len(segments))
    for row in dataset.map(run, num_cpus=1, concurrency=num_workers).iter_rows():
        yield json.loads(row["record"])


def _record_or_error(task: Task, segment: Segment) -> Record:
    # Bad data is an answer, not a fault of the worker: raised there, Ray would retry and wrap it.
    try:
        return task(segment)
    except DataError as error:
        return {"index": segment.index, "error": str(error)}


def _rows_of(record: Record) -> int:
    return sum(int(part["rows"]) for part in record["parts"].values())


def _read_json(path: Path) -> Record:
    """Return a progress file, or nothing where it is damaged: its work is then done again."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _parts_whole(output: Path, record: Record) -> bool:
    # Records are flushed to disk, parts are not: after a power cut a part may be there in name only.
    return all(holds_rows(output / part["file"], part["rows"]) for part in record["parts"].values())


def _our_files(output: Path) -> list[Path]:
    """Return the parts in a folder, half-written ones included."""
    found = [path for split in SPLITS for path in sorted((output / split).glob("*")) if OUR_PART.fullmatch(path.name)]
    return found + sorted(output.glob(f".{MANIFEST}.*{TEMPORARY_SUFFIX}"))


def _remove_dataset(output: Path) -> None:
    """Remove what this module writes, and nothing else: the manifest first, so that the dataset is never half right."""
    (output / MANIFEST).unlink(missing_ok=True)
    for path in _our_files(output):
        path.unlink(missing_ok=True)
    _clear_progress(output)


def _clear_progress(output: Path) -> None:
    progress = output / PROGRESS_FOLDER
    for path in progress.glob("*"):
        path.unlink(missing_ok=True)
    if progress.is_dir():
        progress.rmdir()
