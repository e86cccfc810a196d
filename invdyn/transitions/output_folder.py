"""The folder that a dataset is made in: what an earlier run left there, what of it is kept, and when it is whole.

A finished dataset is replaced only by a finished one: until then the new one lies in a folder inside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from invdyn import storage
from invdyn.errors import DataError
from invdyn.sequences.base import EPISODE_COLUMNS
from invdyn.storage import TEMPORARY_SUFFIX, join
from invdyn.transitions.plan import SPLITS, Segment
from invdyn.transitions.scan import Scan
from invdyn.transitions.store import MANIFEST, NEW_FOLDER, PROGRESS_FOLDER, holds_rows, write_json

PLAN_FILE = "plan.json"
SCAN_FILE = "scan.json"
OUR_PART = re.compile(rf"\.?part-\d{{5,}}\.h5(\.\d+(\.[0-9a-f]{{8}})?{re.escape(TEMPORARY_SUFFIX)})?")
UNFINISHED_MANIFEST = re.compile(rf"\.{re.escape(MANIFEST)}\..*{re.escape(TEMPORARY_SUFFIX)}")
RECORD = re.compile(r"segment-.*\.json")

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Where a dataset is made, and what an earlier run of the same plan found out.

    Attributes:
        output: the dataset's folder.
        folder: where its parts are written: `output`, or a folder in it while that holds a finished dataset.
        plan_hash: identity of the plan.
        resume: whether `folder` holds an earlier run of the same plan.
        damaged: files found to be damaged when they were read, and why.
    """

    output: str
    folder: str
    plan_hash: str
    resume: bool = False
    damaged: Mapping[str, str] = field(default_factory=dict)

    def saved_scan(self, damaged: Mapping[str, str]) -> Scan | None:
        """Return what an earlier run measured for the filters on the recording without `damaged`, if it did."""
        saved = _read_json(join(self.folder, PROGRESS_FOLDER, SCAN_FILE)) if self.resume else {}
        return Scan.from_json(saved["scan"]) if saved.get("damaged") == dict(damaged) else None


def check_output(output: str, plan_hash: str, overwrite: bool) -> Job:
    """Return where to make the dataset; nothing is changed yet.

    Raises:
        DataError: when the folder holds a finished dataset or another plan, and `overwrite` is not set.
    """
    finished = storage.exists(join(output, MANIFEST))
    new = join(output, NEW_FOLDER)
    replaces = (finished and overwrite) or (not finished and storage.exists(join(new, PROGRESS_FOLDER, PLAN_FILE)))
    folder = new if replaces else output
    plan_file = join(folder, PROGRESS_FOLDER, PLAN_FILE)
    started = storage.exists(plan_file)
    plan = _read_json(plan_file) if started else {}
    same = plan.get("plan_hash") == plan_hash
    job = Job(output, folder, plan_hash, same, plan.get("damaged", {}) if same else {})
    if overwrite:
        return job
    # A run killed after its manifest, before it cleared its progress, is continued too: that only clears it.
    if finished and not same:
        raise DataError(f"dataset exists already: {output}; give --overwrite to replace it")
    if started and not same:
        raise DataError(
            f"{output} holds an unfinished dataset with another plan (config, --max_samples or recording changed); "
            "give --overwrite to replace it"
        )
    if not started and (parts := our_files(output)):
        raise DataError(
            f"{output} holds parts of a dataset without {MANIFEST} ({len(parts)} files, first "
            f"{storage.base_name(parts[0])}); give --overwrite to replace them"
        )
    return job


def open_output(
    job: Job, segments: Iterable[Segment], scan: Scan, damaged: Mapping[str, str], *, resume: bool
) -> dict[int, Record]:
    """Prepare the folder and return the records of finished segments that this plan wants as they are.

    Args:
        job: where.
        segments: of the plan.
        scan: what was measured for the filters.
        damaged: files that the plan leaves out.
        resume: keep what is there, as far as it fits.

    Raises:
        DataError: when the folder cannot be written.
    """
    progress = join(job.folder, PROGRESS_FOLDER)
    try:
        if not resume:
            remove_dataset(job.folder)
        keys = {segment.index: segment_key(segment, scan) for segment in segments}
        names = (name for name in sorted(storage.list_names(progress)) if RECORD.fullmatch(name))
        records = [_read_json(join(progress, name)) for name in names]
        kept = {
            record["index"]: record
            for record in records
            if record and keys.get(record["index"]) == record["key"] and _parts_whole(job.folder, record)
        }
        remove_others(job.folder, kept.values())
    except OSError as error:
        raise DataError(f"cannot clear {job.folder}: {error}; check its permissions or set output_path") from None
    write_json(join(progress, PLAN_FILE), {"plan_hash": job.plan_hash, "damaged": dict(damaged)})
    if not scan.is_trivial:
        write_json(join(progress, SCAN_FILE), {"damaged": dict(damaged), "scan": scan.to_json()})
    return kept


def segment_key(segment: Segment, scan: Scan) -> str:
    """Return a hash of all that decides what a segment's parts hold, beside what is the same for the whole plan."""
    sequences = segment.sequences
    facts = [
        segment.index,
        segment.first_episode,
        segment.hash_files,
        [(file.name, file.size, file.version) for file in sequences.files],
        scan.filter_json(),
    ]
    digest = xxhash.xxh3_128(json.dumps(facts).encode())
    columns = [getattr(sequences, name) for name in ("file_index", *EPISODE_COLUMNS)]
    for column in (*columns, segment.split, segment.row_limit, segment.keep):
        digest.update(b"-" if column is None else np.ascontiguousarray(column, dtype="<i8").data)
    return digest.hexdigest()


def save_record(folder: str, record: Record) -> None:
    """Keep the record of a finished segment, for a run that continues this one."""
    write_json(join(folder, PROGRESS_FOLDER, f"segment-{record['index']:05d}.json"), record)


def finish(job: Job, manifest: Record, records: Iterable[Record]) -> None:
    """Write the manifest, and put the dataset in the place of the one that it replaces."""
    remove_others(job.folder, records)
    write_json(join(job.folder, MANIFEST), manifest, indent=1)
    if job.folder != job.output:
        _switch(job.output, job.folder, manifest)
    _clear_progress(job.output)


def _switch(output: str, new: str, manifest: Record) -> None:
    """Replace a dataset: stopped anywhere in here, the next run finds all that it needs and ends the same."""
    parts = {part["file"] for split in SPLITS for part in manifest["splits"][split]["parts"]}
    storage.remove([join(output, MANIFEST), *our_files(output)])
    for name in (*sorted(parts), MANIFEST):
        storage.move(join(new, name), join(output, name))
    remove_dataset(new)
    for folder in (*(join(new, split) for split in SPLITS), new):
        storage.remove_empty_folder(folder)


def our_files(folder: str) -> list[str]:
    """Return the parts in a folder, half-written ones included."""
    named = [(split, name) for split in SPLITS for name in sorted(storage.list_names(join(folder, split)))]
    parts = [join(folder, split, name) for split, name in named if OUR_PART.fullmatch(name)]
    return parts + [join(folder, n) for n in sorted(storage.list_names(folder)) if UNFINISHED_MANIFEST.fullmatch(n)]


def remove_others(folder: str, records: Iterable[Record]) -> None:
    """Remove all parts that these records do not name, and what was half written."""
    named = {join(folder, part["file"]) for record in records for part in record["parts"].values()}
    storage.remove(path for path in our_files(folder) if path not in named)


def remove_dataset(folder: str) -> None:
    """Remove what this project writes, and nothing else: the manifest first, so that a dataset is never half right."""
    storage.remove([join(folder, MANIFEST)])
    remove_others(folder, ())
    _clear_progress(folder)


def _clear_progress(folder: str) -> None:
    progress = join(folder, PROGRESS_FOLDER)
    storage.remove(join(progress, name) for name in storage.list_names(progress))
    storage.remove_empty_folder(progress)


def _read_json(path: str) -> Record:
    """Return a progress file, or nothing where it is missing or damaged: its work is then done again."""
    try:
        values = json.loads(storage.read_text(path))
    except (ValueError, FileNotFoundError):
        return {}
    return values if isinstance(values, dict) else {}


def _parts_whole(folder: str, record: Record) -> bool:
    # A part is on the disk before its record is, but may have been removed or cut short since.
    return all(holds_rows(join(folder, part["file"]), part["rows"]) for part in record["parts"].values())
