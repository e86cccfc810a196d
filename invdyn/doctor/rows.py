"""Checks of whole rows: stale and duplicate ones, and steps that jump more than any other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from invdyn.doctor.findings import ERROR, INFO, MAX_PLACES, WARNING, Finding
from invdyn.doctor.sample import Sample
from invdyn.doctor.values import Names
from invdyn.transitions.filters import relative_steps, stale_steps, state_scale, step_sizes, typical_step
from invdyn.transitions.plan import SPLITS, TRAIN

ISOLATION = 4.0
"""A dimension jumps when it moves this many times further than in each of the two steps before and after."""

BOUNDARY_SHARE = 0.5
"""Share of the dimensions that must jump in the same step. An impact makes velocities jump, but not positions."""

JUMP_STDS = 0.05
"""A dimension that moves by less does not jump, however still it was: a joint that leaves its stop is no reset."""

JUMP_MULTIPLE = 4.0
"""Smallest step, in multiples of the median step, that can be a jump."""

SPIKE_ISOLATION = 10.0
SPIKE_STDS = 1.0
WRAP_TOLERANCE = 0.1
WRAP_RANGE = 1.02
"""Largest range of an angle that wraps, in turns: a velocity may jump by as much as a turn, and moves further."""

TURNS = {"2 pi": 2 * np.pi, "360": 360.0}

SHARED_ERROR_SHARE = 0.1
"""Share of the validation rows that, found in train too, makes validation meaningless."""

DUPLICATE_WARNING_SHARE = 0.01
MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)

FloatRows = Float[np.ndarray, "rows dim"]
Mask = Bool[np.ndarray, "steps"]


def stale_ends(sample: Sample) -> Bool[np.ndarray, "episodes"]:
    """Return which episodes end in exactly the state that the next episode of the same file starts with.

    Where the file marks an end but the simulation was not reset, the state of the row after the mark is the old one:
    the recorded action did nothing. Readers cut there, so that it is no row of the dataset.
    """
    stale = np.zeros(sample.num_episodes, dtype=bool)
    plan = sample.plan
    neighbours = (np.diff(sample.number) == 1) & (np.diff(plan.file_index) == 0)
    last = sample.state[sample.state_start[1:] - 1]
    stale[:-1] = neighbours & (last == sample.state[sample.state_start[1:]]).all(axis=1)
    return stale


def hash_rows(values: FloatRows) -> UInt64[np.ndarray, "rows"]:
    """Return a 64-bit hash of each row; equal rows (0.0 and -0.0 included) have equal hashes."""
    return hash_bits(np.ascontiguousarray(values + 0.0).view(np.uint64))


def hash_bits(bits: UInt64[np.ndarray, "rows columns"]) -> UInt64[np.ndarray, "rows"]:
    """Return a 64-bit hash of each row: among a million rows, two share one by chance once in 10^7 recordings."""
    keys = np.random.default_rng(0).integers(2**63, 2**64, size=(bits.shape[1], 1), dtype=np.uint64) | np.uint64(1)
    total = np.zeros(len(bits), dtype=np.uint64)
    for index, column in enumerate(bits.T):
        mixed = (column ^ (column >> np.uint64(31))) * keys[index]
        total += (mixed ^ (mixed >> np.uint64(29))) * MULTIPLIER
    return total


def repeated(hashes: UInt64[np.ndarray, "rows"]) -> Bool[np.ndarray, "rows"]:
    """Return which rows equal an earlier one.

    Example:
        >>> repeated(np.array([5, 7, 5, 5], np.uint64)).tolist()
        [False, False, True, True]
    """
    first = np.unique(hashes, return_index=True)[1]
    again = np.ones(len(hashes), dtype=bool)
    again[first] = False
    return again


def neighbour_steps(
    moved: Float[np.ndarray, "steps varying"], episode: Int[np.ndarray, "steps"], reach: int = 2
) -> Float[np.ndarray, "steps varying"]:
    """Return how far each dimension moves at most in the steps before and after, within the episode."""
    largest = np.zeros_like(moved)
    for offset in range(1, reach + 1):
        same = (episode[offset:] == episode[:-offset])[:, None]
        np.maximum(largest[:-offset], moved[offset:] * same, out=largest[:-offset])
        np.maximum(largest[offset:], moved[:-offset] * same, out=largest[offset:])
    return largest


def jump_steps(moved: Float[np.ndarray, "steps varying"], episode: Int[np.ndarray, "steps"]) -> Mask:
    """Return which steps jump: most dimensions move, at once, far more than in the steps around."""
    around = neighbour_steps(moved, episode)
    alone = np.bincount(episode)[episode] < 3  # nothing around to compare with
    share = ((moved > JUMP_STDS) & (moved > ISOLATION * around)).mean(axis=1)
    size = step_sizes(moved)
    large = (size > JUMP_MULTIPLE * typical_step(size)) & ~alone
    sure = large & (share > BOUNDARY_SHARE)
    # Exactly half, all velocities of a state say, may be an impact; beside boundaries that are sure it is one more.
    return np.asarray(large & (share >= BOUNDARY_SHARE)) if sure.any() else np.asarray(sure)


def spikes(
    moved: Float[np.ndarray, "steps varying"], episode: Int[np.ndarray, "steps"]
) -> Bool[np.ndarray, "steps varying"]:
    """Return which dimensions jump alone, and by more than their own standard deviation."""
    around = neighbour_steps(moved, episode)
    alone = np.bincount(episode)[episode] < 3
    return np.asarray((moved > SPIKE_STDS) & (moved > SPIKE_ISOLATION * around) & ~alone[:, None])


@dataclass(frozen=True)
class Motion:
    """How far the steps of a sample go, and where they go in a way that no dynamics does.

    Attributes:
        varying: (varying,) the state dimensions that vary.
        distance: (steps, varying) how far each step moves them, in their units.
        size: (steps,) size of each step, as the filter `drop_jumps` measures it.
        wraps: for each of `TURNS`, (steps, varying) where an angle starts anew at its other end.
        jumps: (steps,) steps across a boundary that is not marked.
        spikes: (steps, varying) dimensions that jump alone, by no full turn.
    """

    varying: Int[np.ndarray, "varying"]
    distance: Float[np.ndarray, "steps varying"]
    size: Float[np.ndarray, "steps"]
    wraps: dict[str, Bool[np.ndarray, "steps varying"]]
    jumps: Mask
    spikes: Bool[np.ndarray, "steps varying"]

    @property
    def breaks(self) -> Mask:
        """Steps that jump in some dimension."""
        return np.asarray(self.jumps | np.any([self.spikes, *self.wraps.values()], axis=(0, 2)))


def measure_motion(sample: Sample) -> Motion | None:
    """Return how the steps of a sample go; None where no state dimension varies, or there is no step."""
    steps, scale = sample.steps, state_scale(sample.state)
    varying = np.flatnonzero(np.isfinite(scale))
    if not len(varying) or not len(steps):
        return None
    scale = scale[varying]
    moved = relative_steps(sample.state[:, varying], steps.state_row, scale)
    distance, size, wraps = moved * scale, step_sizes(moved), {}
    turning = np.ptp(sample.state[:, varying], axis=0)
    sudden = spikes(moved, steps.episode)
    for text, turn in TURNS.items():
        wraps[text] = sudden & (np.abs(distance - turn) < WRAP_TOLERANCE * turn) & (turning <= WRAP_RANGE * turn)
        # But for the turn, the step is like any other.
        moved = np.where(wraps[text], np.abs(distance - turn) / scale, moved)
    jumps = jump_steps(moved, steps.episode)
    return Motion(varying, distance, size, wraps, jumps, spikes(moved, steps.episode) & ~jumps[:, None])


def check_stale(sample: Sample) -> list[Finding]:
    """Find steps whose state after equals the state before, inside episodes and across their ends."""
    inside = np.flatnonzero(stale_steps(sample.state, sample.steps.state_row))
    ends = np.flatnonzero(stale_ends(sample))
    if not len(inside) and not len(ends):
        return []
    at_ends = tuple(sample.place(int(e), int(sample.num_states[e]) - 1) for e in ends)
    places = tuple(sorted((*sample.places(inside), *at_ends), key=lambda p: (p.file, p.episode, p.step)))
    total = len(inside) + len(ends)
    share = len(inside) / max(len(sample.steps), 1)
    fix = "filters: {drop_stale: true}" if len(inside) else "nothing: the episodes are cut there, as they should be"
    return [
        Finding(
            check="stale",
            severity=WARNING,
            title=f"{total:,} stale {'row' if total == 1 else 'rows'}: the state after is exactly the state before",
            evidence=f"{len(inside):,} inside episodes ({share:.2%} of the steps), {len(ends):,} at an episode's end, "
            "where the next episode starts in the same state: the recording goes on without a reset, and the step "
            f"across is no row of the dataset. Their action did nothing; first at {places[0]}",
            fix=fix,
            places=places[:MAX_PLACES],
            figures={"inside": len(inside), "at_ends": len(ends), "share_inside": share},
        )
    ]


def check_duplicates(sample: Sample) -> list[Finding]:
    """Find rows (s, a, s') that occur more than once, within a split and between train and the other splits."""
    steps = sample.steps
    states = hash_rows(sample.state)
    actions = hash_rows(sample.action)
    hashes = hash_bits(
        np.stack([states[steps.state_row], actions[steps.action_row], states[steps.state_row + 1]], axis=1)
    )
    # Steps at rest repeat themselves by nature, and are reported as stale.
    moving = np.flatnonzero(~stale_steps(sample.state, steps.state_row))
    hashes, split = hashes[moving], sample.split[steps.episode[moving]]
    findings = []
    for index, name in enumerate(SPLITS):
        if index == TRAIN or not (split == index).any():
            continue
        shared = moving[(split == index) & np.isin(hashes, hashes[split == TRAIN])]
        if len(shared):
            findings.append(_shared_rows(sample, name, shared, int((split == index).sum())))
    again = repeated(hashes)
    within = moving[again & ~np.isin(hashes, np.intersect1d(hashes[split == TRAIN], hashes[split != TRAIN]))]
    if len(within):
        share = len(within) / len(moving)
        places = sample.places(within)
        findings.append(
            Finding(
                check="duplicates",
                severity=WARNING if share >= DUPLICATE_WARNING_SHARE else INFO,
                title=f"{len(within):,} rows ({share:.2%}) repeat an earlier row exactly",
                evidence=f"same state, action and next state; first repeat at {places[0]}; "
                f"episodes that are copies from start to end: {_whole_episodes(sample, within):,}",
                fix="filters: {episodes: {exclude: [FILE:EPISODE, ...]}} with the copies"
                if share >= DUPLICATE_WARNING_SHARE
                else "",
                places=places,
                figures={"rows": len(within), "share": share, "episodes": _whole_episodes(sample, within)},
            )
        )
    return findings


def check_jumps(sample: Sample, motion: Motion, names: Names) -> list[Finding]:
    """Find steps that look like a boundary which the file does not mark, and single dimensions that jump."""
    findings = _jump_finding(sample, motion.size, np.flatnonzero(motion.jumps)) if motion.jumps.any() else []
    return findings + _wrap_findings(sample, names, motion) + _spike_findings(sample, names, motion)


def _jump_finding(sample: Sample, size: Float[np.ndarray, "steps"], jumps: Int[np.ndarray, "jumps"]) -> list[Finding]:
    median = typical_step(size)
    spread = 1.4826 * float(np.median(np.abs(size - median))) or median
    others = np.delete(size, jumps)
    smallest = float(size[jumps].min())
    limit = np.sqrt(smallest * others.max()) if others.max() < smallest else smallest
    last = _last_steps(sample)[jumps]
    late = f"; {int(last.sum()):,} are the last step of their episode: its end is marked too late" if last.any() else ""
    places = sample.places(jumps)
    return [
        Finding(
            check="jumps",
            severity=ERROR,
            title=f"{_steps(len(jumps))} like a reset that the file does not mark",
            evidence=f"most state dimensions at once move over {ISOLATION:g} times further than in the steps around; "
            f"step size at least {smallest / median:.3g} times the median, robust z at least "
            f"{(smallest - median) / spread:.3g}; no other step exceeds {others.max() / median:.3g}{late}; "
            f"first at {places[0]}",
            fix=f"filters: {{drop_jumps: {_two_digits(limit / median):g}}}, or mark the episode ends in the recording",
            places=places,
            figures={
                "steps": len(jumps),
                "smallest_multiple": smallest / median,
                "multiples": (size[jumps] / median).tolist()[:MAX_PLACES],
                "largest_other": others.max() / median,
                "robust_z": ((size[jumps] - median) / spread).tolist()[:MAX_PLACES],
                "at_episode_end": int(last.sum()),
            },
        )
    ]


def _wrap_findings(sample: Sample, names: Names, motion: Motion) -> list[Finding]:
    findings = []
    for text, wraps in motion.wraps.items():
        dims, found = motion.varying[wraps.any(axis=0)], np.flatnonzero(wraps.any(axis=1))
        if len(found):
            findings.append(
                Finding(
                    check="angle_wraps",
                    severity=WARNING,
                    title=f"an angle wraps: {names.of_states(dims)} jumps by {text} in {len(found):,} steps",
                    evidence=f"the step there is {motion.distance[wraps].mean():.4g} on average, and small in all "
                    "other steps around; s' - s is wrong by a full turn in those rows; first at "
                    f"{sample.places(found)[0]}",
                    fix="record sine and cosine instead of the angle, or unwrap it",
                    places=sample.places(found),
                    figures={"dims": dims.tolist(), "steps": len(found)},
                )
            )
    return findings


def _spike_findings(sample: Sample, names: Names, motion: Motion) -> list[Finding]:
    # At an episode's first or last step only one side says what is usual.
    alone = motion.spikes & ((sample.steps.step > 0) & ~_last_steps(sample))[:, None]
    found = np.flatnonzero(alone.any(axis=1))
    if not len(found):
        return []
    dims = motion.varying[alone.any(axis=0)]
    return [
        Finding(
            check="spikes",
            severity=WARNING,
            title=f"{_steps(len(found))} in single state dimensions",
            evidence=f"{names.of_states(dims)}: over {SPIKE_ISOLATION:g} times further than in the steps around and "
            "more than the dimension's standard deviation: an impact, a sensor fault, or a key that is set once; "
            f"first at {sample.places(found)[0]}",
            fix="look at them; filters: {drop_jumps: ...} leaves them out",
            places=sample.places(found),
            figures={"dims": dims.tolist(), "steps": len(found)},
        )
    ]


def _last_steps(sample: Sample) -> Mask:
    return np.append(np.diff(sample.steps.episode) > 0, True)


def _shared_rows(sample: Sample, name: str, shared: Int[np.ndarray, "shared"], total: int) -> Finding:
    share = len(shared) / total
    places = sample.places(shared)
    return Finding(
        check="shared_rows",
        severity=ERROR if share >= SHARED_ERROR_SHARE else WARNING,
        title=f"{len(shared):,} rows of {name} ({share:.2%}) are in train too",
        evidence=f"same state, action and next state; first at {places[0]}; episodes that are "
        f"copies from start to end: {_whole_episodes(sample, shared):,}. A model that remembers is rewarded there",
        fix="filters: {episodes: {exclude: [FILE:EPISODE, ...]}} with the copies",
        places=places,
        figures={"split": name, "rows": len(shared), "share": share, "episodes": _whole_episodes(sample, shared)},
    )


def _whole_episodes(sample: Sample, steps: Int[np.ndarray, "steps"]) -> int:
    """Return how many episodes have all their steps in `steps`."""
    counts = np.bincount(sample.steps.episode, minlength=sample.num_episodes)
    return int(
        ((np.bincount(sample.steps.episode[steps], minlength=sample.num_episodes) == counts) & (counts > 0)).sum()
    )


def _steps(count: int) -> str:
    return f"{count:,} {'step jumps' if count == 1 else 'steps jump'}"


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
