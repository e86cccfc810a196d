"""What the doctor says: findings with a severity, the evidence, and what to set in the config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ERROR, WARNING, INFO = "error", "warning", "info"
SEVERITIES = (ERROR, WARNING, INFO)
MAX_PLACES = 1000


@dataclass(frozen=True)
class Place:
    """Where something was found.

    Attributes:
        file: name of the file, relative to the recording's folder.
        episode: number of the episode within the file.
        step: step within the episode, or within the piece of it that the reader gives.
        row: row of the file's arrays, where the format has flat arrays.
    """

    file: str
    episode: int
    step: int
    row: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: episode {self.episode}, step {self.step}" + (
            "" if self.row is None else f", row {self.row}"
        )


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor found.

    Attributes:
        check: name of the check.
        severity: `error` (training on this gives a wrong model), `warning` (worse than it need be) or `info`.
        title: what was found, in one line.
        evidence: the figures behind it, in words.
        fix: what to set in the config, or to do; empty when there is nothing to do.
        places: where, at most `MAX_PLACES`, in the recording's order.
        figures: the numbers, by name.
    """

    check: str
    severity: str
    title: str
    evidence: str
    fix: str = ""
    places: tuple[Place, ...] = ()
    figures: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.severity in SEVERITIES, self.severity


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings, errors first, otherwise in the given order."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def has_errors(findings: Iterable[Finding]) -> bool:
    """Return whether any finding is an error."""
    return any(finding.severity == ERROR for finding in findings)


def count_severities(findings: Iterable[Finding]) -> str:
    """Return how many findings there are of each severity, in words.

    Example:
        >>> count_severities([Finding("stale", WARNING, "", ""), Finding("lag", WARNING, "", "")])
        '0 errors, 2 warnings'
    """
    counts = Counter(finding.severity for finding in findings)
    return ", ".join(f"{counts[name]} {name}{'' if counts[name] == 1 else 's'}" for name in (ERROR, WARNING))


def summarize(findings: Sequence[Finding]) -> str:
    """Return a few lines for the end of a command: the counts, then one line for each error and warning.

    Example:
        >>> print(summarize([Finding("jumps", ERROR, "3 steps jump", "", fix="filters: {drop_jumps: 5}")]))
        doctor: 1 error, 0 warnings
          error: 3 steps jump; filters: {drop_jumps: 5}
    """
    problems = [finding for finding in by_severity(findings) if finding.severity != INFO]
    lines = [f"  {f.severity}: {f.title}" + (f"; {f.fix}" if f.fix else "") for f in problems]
    return "\n".join([f"doctor: {count_severities(findings)}", *lines])
