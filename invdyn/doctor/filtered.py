"""What the filters of a config already see to: such findings stay in the report, as information."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from invdyn.doctor.findings import INFO, Finding
from invdyn.transitions.filters import FiltersConfig


def mark_filtered(findings: Iterable[Finding], filters: FiltersConfig) -> list[Finding]:
    """Return the findings, those that the filters leave out of the dataset as information that names the filter."""
    return [_mark(finding, _filter_of(finding, filters)) for finding in findings]


def _mark(finding: Finding, name: str | None) -> Finding:
    if name is None:
        return finding
    return replace(finding, severity=INFO, title=f"{finding.title}; left out by filters: {name}", fix="")


def _filter_of(finding: Finding, filters: FiltersConfig) -> str | None:
    """Return the filter that leaves all of a finding out, or None."""
    if finding.check == "stale" and filters.drop_stale:
        return "drop_stale"
    if finding.check == "constant" and filters.drop_constant_dims:
        return "drop_constant_dims"
    if finding.check == "saturated" and filters.saturated_actions != "keep":
        return "saturated_actions"
    if finding.check == "jumps" and filters.drop_jumps is not None:
        smallest = finding.figures["smallest_multiple"]
        assert isinstance(smallest, float)
        return "drop_jumps" if smallest > filters.drop_jumps else None
    return None
