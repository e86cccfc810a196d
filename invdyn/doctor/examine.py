"""Run every check on a recording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from invdyn.doctor.filtered import mark_filtered
from invdyn.doctor.findings import ERROR, INFO, WARNING, Finding, by_severity
from invdyn.doctor.identifiability import (
    Identifiability,
    check_identifiability,
    measure_identifiability,
    rows_around,
)
from invdyn.doctor.lag import Lag, check_lag, measure_lag
from invdyn.doctor.leakage import check_leakage
from invdyn.doctor.rows import check_duplicates, check_jumps, check_stale, measure_motion
from invdyn.doctor.sample import Sample, read_sample, select_episodes_of
from invdyn.doctor.shift import Shift, check_shift, measure_shift
from invdyn.doctor.values import (
    Names,
    bound_shares,
    check_constant,
    check_finite_values,
    check_rounding,
    check_saturated,
)
from invdyn.errors import DataError
from invdyn.sequences.base import SequencePlan, SequenceReader
from invdyn.sequences.registry import open_sequences
from invdyn.transitions.dataset_config import DatasetConfig, ShapeMeta
from invdyn.transitions.filters import select_episodes
from invdyn.transitions.plan import NO_SPLIT, TRAIN, Episodes, kept_episodes, make_plan
from invdyn.transitions.windows import Window

MAX_ROWS = 200_000
MANY_DROPPED = 0.2


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at, what was found, and the measurements behind it.

    Attributes:
        name: name of the dataset.
        path: the recording.
        format_name: its format.
        window: what a row holds.
        total_states: states of the whole recording.
        total_episodes: episodes of the whole recording.
        num_states: states looked at.
        num_episodes: episodes looked at.
        names: names of the dimensions.
        findings: errors first.
        lag: None where the episodes are too short, or nothing is finite, or no state or no action varies.
        identifiability: as `lag`.
        shifts: how each other split differs from train.
        step_sizes: (steps,) size of each step; see `transitions.filters.step_sizes`.
        jumps: (jumps,) which of them jump.
        at_bounds: (2, action_dim) share of rows at the lowest and highest value of each action.
    """

    name: str
    path: str
    format_name: str
    window: Window
    total_states: int
    total_episodes: int
    num_states: int
    num_episodes: int
    names: Names
    findings: tuple[Finding, ...]
    lag: Lag | None
    identifiability: Identifiability | None
    shifts: tuple[Shift, ...]
    step_sizes: Float[np.ndarray, "steps"]
    jumps: Int[np.ndarray, "jumps"]
    at_bounds: Float[np.ndarray, "two action_dim"]

    @property
    def is_sample(self) -> bool:
        """Whether only some of the episodes were looked at."""
        return self.num_episodes < self.total_episodes

    @property
    def scope(self) -> str:
        """What was looked at, in words."""
        counts = f"{self.num_states:,} states in {self.num_episodes:,} episodes"
        if self.is_sample:
            counts += f", a sample of {self.total_states:,} states in {self.total_episodes:,} episodes"
        window = f"gap {self.window.gap}, horizon {self.window.horizon}, history {self.window.history}"
        return f"{counts}; {window}"


def diagnose(config: DatasetConfig, *, max_rows: int = MAX_ROWS, without: Mapping[str, str] | None = None) -> Diagnosis:
    """Look for faults in the recording of a dataset.

    Args:
        config: the dataset.
        max_rows: states to look at; of a longer recording whole, evenly spaced episodes are taken.
        without: damaged files that the dataset was made without, and why; see `SequenceReader.inspect`.

    Raises:
        ConfigError: when the config names an unknown format or key.
        DataError: when the recording cannot be read at all.
    """
    reader = open_sequences(
        config.sequence_path,
        format_name=config.format,
        state_keys=config.state_keys,
        action_key=config.shape_meta.action_key if config.shape_meta else None,
        options=config.format_options,
    )
    return diagnose_recording(reader, config, max_rows=max_rows, without=without)


def diagnose_recording(
    reader: SequenceReader,
    config: DatasetConfig,
    *,
    max_rows: int = MAX_ROWS,
    without: Mapping[str, str] | None = None,
) -> Diagnosis:
    """Look for faults in what a reader reads, for the rows and splits that a config asks for."""
    plan = reader.inspect(without)
    window = Window(config.gap, config.horizon, config.history)
    keep, split, findings = _split(plan, window, config)
    findings += _plan_findings(plan)
    sample, failed = read_sample(reader, plan, split, max_rows, keep)
    findings += [
        Finding("readable", ERROR, f"a file cannot be read: {name}", reason, "repair it, or on_error: skip")
        for name, reason in failed.items()
    ]
    names = dimension_names(config.shape_meta, plan.state_dim, plan.action_dim)
    seen = select_episodes_of(plan, np.flatnonzero(keep))
    diagnosis = _examine(sample, names, window, findings, seen, (config.name, config.sequence_path, reader.format_name))
    return replace(diagnosis, findings=by_severity(mark_filtered(diagnosis.findings, config.filters)))


def dimension_names(shape_meta: ShapeMeta | None, state_dim: int, action_dim: int) -> Names:
    """Name the state's dimensions by their keys where the config gives all shapes, else by number.

    Example:
        >>> dimension_names(ShapeMeta(obs={"arm": {"shape": [2]}, "grip": {"shape": [1]}}), 3, 1).state
        ('arm[0]', 'arm[1]', 'grip')
    """
    state = tuple(f"state {i}" for i in range(state_dim))
    if shape_meta and len(shape_meta.obs) > 1 and all(meta.shape is not None for meta in shape_meta.obs.values()):
        widths = {key: int(np.prod(meta.shape or ())) for key, meta in shape_meta.obs.items()}
        named = tuple(f"{key}[{i}]" if width > 1 else key for key, width in widths.items() for i in range(width))
        state = named if len(named) == state_dim else state
    return Names(state, tuple(f"action {i}" for i in range(action_dim)))


def _examine(
    whole: Sample,
    names: Names,
    window: Window,
    findings: list[Finding],
    plan: SequencePlan,
    identity: tuple[str, str, str],
) -> Diagnosis:
    broken, clean = check_finite_values(whole)
    findings = [*findings, *broken]
    sample = whole if clean.all() else whole.select(clean)
    lag, identifiability, shifts = None, None, []
    sizes, jumps, cuts = np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
    at_bounds = np.zeros((2, plan.action_dim))
    if sample.num_episodes and len(sample.steps):
        steps = sample.steps
        findings += [*check_rounding(sample, names), *check_constant(sample, names)]
        findings += [*check_saturated(sample, names), *check_stale(sample), *check_duplicates(sample)]
        motion = measure_motion(sample)
        if motion is not None:
            findings += check_jumps(sample, motion, names)
            # One jump among thousands of steps outweighs them all in a least-squares fit.
            sizes, jumps, cuts = motion.size, np.flatnonzero(motion.jumps), np.flatnonzero(motion.breaks)
        findings += check_leakage(sample, window, names)
        at_bounds = bound_shares(sample.action)
        rows = rows_around(sample.cut_at(cuts), window)
        if rows is not None:
            lag = measure_lag(rows, plan.action_dim)
            identifiability = measure_identifiability(rows, window, plan.action_dim)
            findings += check_lag(lag, window, names, identifiability.advised[0])
            findings += check_identifiability(identifiability, names)
        values = np.concatenate([sample.state[steps.state_row], sample.action[steps.action_row]], axis=1)
        shifts = measure_shift(values, steps.episode, sample.split)
        findings += check_shift(names, shifts)
    name, path, format_name = identity
    return Diagnosis(
        name=name,
        path=path,
        format_name=format_name,
        window=window,
        total_states=int(plan.num_states.sum()),
        total_episodes=plan.num_episodes,
        num_states=len(whole.state),
        num_episodes=whole.num_episodes,
        names=names,
        findings=by_severity(findings),
        lag=lag,
        identifiability=identifiability,
        shifts=tuple(shifts),
        step_sizes=sizes,
        jumps=jumps,
        at_bounds=at_bounds,
    )


def _split(
    plan: SequencePlan, window: Window, config: DatasetConfig
) -> tuple[Episodes, Int[np.ndarray, "episodes"], list[Finding]]:
    """Choose and split the episodes as the extraction does; where it would refuse, say so and take all for training."""
    keep = np.ones(plan.num_episodes, dtype=bool)
    try:
        drops = select_episodes(config.filters, plan)
        keep = kept_episodes(plan, drops)
        extraction = make_plan(
            plan,
            window,
            dataset_name=config.name,
            val_ratio=config.val_ratio,
            test_ratio=config.test_ratio,
            recorded_splits=config.splits == "recorded",
            episode_drops=drops,
        )
    except DataError as error:
        refused = Finding("extraction", ERROR, "create_dataset would refuse this config", str(error))
        everything = np.ones(plan.num_episodes, dtype=bool)
        return keep if keep.any() else everything, np.full(plan.num_episodes, TRAIN), [refused]
    keep = keep & (extraction.split != NO_SPLIT)
    actions = int(plan.num_actions[keep].sum())
    dropped = actions - extraction.num_rows
    if dropped <= MANY_DROPPED * actions:
        return keep, extraction.split, []
    reasons = {reason: count for reason, count in extraction.drops.items() if count}
    listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
    few = Finding(
        check="dropped",
        severity=WARNING,
        title=f"{dropped / actions:.0%} of the actions start no row",
        evidence=f"{dropped:,} of {actions:,}: {listed}; episodes hold {plan.num_states.mean():.3g} states on average",
        fix="a smaller gap, horizon or history",
        figures={"dropped": dropped, "actions": actions, "reasons": reasons},
    )
    return keep, extraction.split, [few]


def _plan_findings(plan: SequencePlan) -> list[Finding]:
    findings = [
        # Files are skipped only where the config asks for that: it is then no reason to stop.
        Finding("readable", WARNING, f"a file cannot be read, and is skipped: {name}", reason, "repair it")
        for name, reason in plan.skipped.items()
    ]
    findings += [Finding("contradiction", WARNING, "the recording contradicts itself", text) for text in plan.warnings]
    dropped = {reason: count for reason, count in plan.drops.items() if count}
    if dropped:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        total = sum(dropped.values())
        title = f"{total:,} recorded rows are no transitions, and in no episode"
        findings.append(Finding("not_transitions", INFO, title, listed, figures=dict(dropped)))
    return findings
