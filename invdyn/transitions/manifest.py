"""The manifest: what a dataset is made of, by whose config, and what was left out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash

from invdyn.statistics import Moments, merge_moments
from invdyn.transitions.dataset_config import DatasetConfig
from invdyn.transitions.filters import ConstantDims, FiltersConfig, describe
from invdyn.transitions.plan import SPLITS, ExtractionPlan
from invdyn.transitions.rounding import ADVICE, Rounding
from invdyn.transitions.scan import Scan
from invdyn.transitions.store import CONSTANT_DIMS, SCHEMA_VERSION

Record = dict[str, Any]


def extraction_config(config: DatasetConfig) -> dict[str, Any]:
    """Return the config without what does not change a row: paths, collection settings, what to do at a bad file."""
    exclude = {"storage", "buffer_path", "output_path", "collect"}
    if config.filters == FiltersConfig():
        exclude.add("filters")  # a dataset without filters is what it was before there were any
    values = config.model_dump(mode="json", exclude=exclude)
    values["format_options"].pop("on_error", None)
    return values


def make_manifest(
    config: DatasetConfig, plan: ExtractionPlan, scan: Scan, records: list[Record], max_samples: int | None
) -> dict[str, Any]:
    """Assemble the manifest from the records in plan order."""
    moments = merge_moments(Moments.from_json(record["moments"]) for record in records if record["moments"])
    parts = {split: [r["parts"][split] for r in records if split in r["parts"]] for split in SPLITS}
    content = xxhash.xxh3_128(json.dumps([[p["file"], p["xxh3_128"]] for s in SPLITS for p in parts[s]]).encode())
    used = plan.row_limit > 0
    constant = scan.constant_dims or ConstantDims()
    filtered: dict[str, Any] = {}
    if config.filters != FiltersConfig():
        filtered["filters"] = describe(scan.row_filter)
        if scan.row_filter.clip_to is not None:
            filtered["filters"]["clipped_rows"] = sum(record["clipped_rows"] for record in records)
    if scan.constant_dims is not None:
        filtered[CONSTANT_DIMS] = scan.constant_dims.model_dump(mode="json")
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "content_hash": content.hexdigest(),
        "row": {
            "state_dim": plan.sequences.state_dim - len(constant.state),
            "action_dim": plan.sequences.action_dim - len(constant.action),
            **asdict(plan.window),
            "state_keys": list(config.state_keys) if config.state_keys else None,
        },
        "num_rows": plan.num_rows,
        "splits": {
            split: {
                "rows": plan.split_rows(index),
                "episodes": int((used & (plan.split == index)).sum()),
                "parts": parts[split],
            }
            for index, split in enumerate(SPLITS)
        },
        "drops": plan.drops,
        **filtered,
        "config": extraction_config(config),
        "max_samples": max_samples,
        "recording": plan.sequences.attributes,
        "warnings": [*plan.sequences.warnings, *rounding_warnings(moments, plan, scan)],
        "skipped_files": plan.sequences.skipped,
        "sources": [source for record in records for source in record["sources"]],
        "statistics": moments.to_json(),
    }


def rounding_warnings(moments: Moments, plan: ExtractionPlan, scan: Scan) -> list[str]:
    """Return a line about the state dimensions, as recorded, that float32 holds too coarsely for their s' - s."""
    recorded = scan.row_filter.state_dims
    dims = np.arange(plan.sequences.state_dim) if recorded is None else recorded
    state = slice(0, len(dims))
    step = slice((plan.window.history + 1) * len(dims), (plan.window.history + 2) * len(dims))
    rounding = Rounding(np.hypot(moments.mean[state], moments.std[state]), moments.std[step])
    if not len(rounding.lossy):
        return []
    named = dims[rounding.lossy].tolist()
    told = f"states are stored as float32, which rounds s' - s of state {named} {rounding.describe_worst()}"
    return [f"{told}; {ADVICE}"]
