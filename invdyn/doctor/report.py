"""Say what the doctor found: a table for the console, JSON, and one HTML page that needs no other file."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from invdyn import storage
from invdyn.doctor.examine import Diagnosis
from invdyn.doctor.findings import ERROR, INFO, WARNING, Finding, count_severities
from invdyn.doctor.identifiability import percent
from invdyn.doctor.plots import draw_all
from invdyn.errors import DataError
from invdyn.evaluation.page import (
    Card,
    heading,
    paragraph,
    render_cards,
    render_facts,
    render_page,
    render_picture,
    side_by_side,
)
from invdyn.evaluation.results import to_plain
from invdyn.transitions.store import write_json
from invdyn.url_path import write_whole

PAGE_FILE = "doctor.html"
JSON_FILE = "doctor.json"
WIDTH = 118
INDENT = 2 + len(WARNING)
SHOWN_PLACES = 20

STYLE = """<style>
.finding { border: 1px solid var(--line); border-left-width: .35rem; border-radius: .6rem;
  padding: .75rem 1.1rem .85rem; margin: .8rem 0; background: var(--card); }
.finding.error { border-left-color: #dc2626; } .finding.warning { border-left-color: #d97706; }
.finding.info { border-left-color: #64748b; }
.finding h3 { margin: 0 0 .25rem; font-size: 1rem; font-weight: 620; overflow-wrap: anywhere; }
.finding p { max-width: none; font-size: .92rem; overflow-wrap: anywhere; }
.tag { display: inline-block; font-size: .74rem; font-weight: 600; letter-spacing: .02em; padding: .05rem .5rem;
  border-radius: 1rem; margin-right: .5rem; color: #fff; vertical-align: .08rem; }
.tag.error { background: #dc2626; } .tag.warning { background: #b45309; } .tag.info { background: #64748b; }
.fix { display: block; margin-top: .5rem; padding: .35rem .65rem; border-radius: .4rem; background: var(--good);
  font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
details { margin-top: .5rem; font-size: .88rem; color: var(--soft); }
details ul { margin: .3rem 0 0; padding-left: 1.3rem; }
.finding.healthy { border-left-color: #059669; }
.finding p::first-letter { text-transform: uppercase; }
figcaption { max-width: 29rem; margin-top: .2rem; }
</style>"""


def render_console(diagnosis: Diagnosis) -> str:
    """Return the findings as a table of severity and text, each with its evidence and what to set."""
    lines = [
        f"doctor: {diagnosis.name}: {count_severities(diagnosis.findings)}",
        *textwrap.wrap(f"{diagnosis.format_name}: {diagnosis.scope}", WIDTH),
        "",
    ]
    for finding in diagnosis.findings:
        lines += _console_lines(finding)
    if not diagnosis.findings:
        lines.append("nothing to report")
    return "\n".join(lines)


def write_reports(diagnosis: Diagnosis, output: str | Path) -> Path:
    """Write `doctor.json` and `doctor.html` into a folder, made when missing.

    Returns:
        Path of the page.

    Raises:
        DataError: when the folder cannot be written.
    """
    storage.check_local("--output", str(output))
    output = Path(output)
    page = output / PAGE_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            text = render_page(f"Doctor: {diagnosis.name}", _blocks(diagnosis, draw_all(diagnosis, Path(folder))))
        write_whole(page, text.encode(errors="backslashreplace"))  # a file's name may be no text
    except OSError as error:
        raise DataError(f"cannot write the report to {output}: {error}; free some space or give --output") from None
    write_json(output / JSON_FILE, to_json(diagnosis))
    return page


def to_json(diagnosis: Diagnosis) -> dict[str, object]:
    """Return everything that was found and measured, as plain values."""
    lag, found = diagnosis.lag, diagnosis.identifiability
    values: dict[str, object] = {
        "name": diagnosis.name,
        "path": diagnosis.path,
        "format": diagnosis.format_name,
        "window": diagnosis.window,
        "states": {"total": diagnosis.total_states, "looked_at": diagnosis.num_states},
        "episodes": {"total": diagnosis.total_episodes, "looked_at": diagnosis.num_episodes},
        "findings": diagnosis.findings,
        "lag": None
        if lag is None
        else {
            "steps": lag.steps,
            "shifts": lag.shifts,
            "unexplained": lag.mean_curve.tolist(),
            "unexplained_per_dim": lag.unexplained.tolist(),
            "best_per_dim": lag.best.tolist(),
            "at_edge": lag.at_edge.tolist(),
        },
        "identifiability": None
        if found is None
        else {
            "unexplained": found.configured,
            "linear": list(found.linear),
            "neighbours": list(found.neighbours),
            "grid": [{"gap": g, "history": h, "unexplained": share} for (g, h), share in found.grid.items()],
            "rows": found.num_rows,
        },
        "splits": [
            {
                "split": shift.split,
                "episodes": shift.num_episodes,
                "p_value": shift.p_value,
                "ks": shift.ks.tolist(),
                "mean_difference": shift.mean_difference.tolist(),
            }
            for shift in diagnosis.shifts
        ],
        "at_bounds": diagnosis.at_bounds.tolist(),
    }
    plain: dict[str, object] = to_plain(values)
    return plain


def _console_lines(finding: Finding) -> list[str]:
    indent = " " * INDENT
    lines = textwrap.wrap(
        finding.title, WIDTH, initial_indent=f"{finding.severity:<{INDENT}}", subsequent_indent=indent
    )
    lines += textwrap.wrap(finding.evidence, WIDTH, initial_indent=indent, subsequent_indent=indent)
    if finding.fix:
        lines += textwrap.wrap(finding.fix, WIDTH, initial_indent=f"{indent}set: ", subsequent_indent=f"{indent}     ")
    return [*lines, ""]


def _blocks(diagnosis: Diagnosis, pictures: Sequence[tuple[Path, str]]) -> list[str]:
    problems = [finding for finding in diagnosis.findings if finding.severity != INFO]
    notes = [finding for finding in diagnosis.findings if finding.severity == INFO]
    blocks = [
        STYLE,
        heading(f"Doctor: {diagnosis.name}", level=1),
        paragraph(f"{diagnosis.scope}.", soft=True),
        render_cards(_cards(diagnosis)),
        heading("What to look at"),
        *(_finding(finding) for finding in problems),
    ]
    if not problems:
        blocks.append('<div class="finding healthy"><h3>No errors and no warnings.</h3></div>')
    if notes:
        blocks += [heading("Good to know"), *(_finding(finding) for finding in notes)]
    blocks += [heading("Measured"), side_by_side(render_picture(path, caption) for path, caption in pictures)]
    facts = {"recording": diagnosis.path, "format": diagnosis.format_name, "looked at": diagnosis.scope}
    return [*blocks, heading("Recording"), render_facts(facts)]


def _cards(diagnosis: Diagnosis) -> list[Card]:
    errors, warnings = (sum(f.severity == name for f in diagnosis.findings) for name in (ERROR, WARNING))
    cards = [
        Card("errors", str(errors), "a model trained on this is wrong" if errors else "nothing makes training wrong"),
        Card("warnings", str(warnings), "worse than it need be" if warnings else "nothing to improve was found"),
    ]
    found, lag = diagnosis.identifiability, diagnosis.lag
    if found is not None and np.isfinite(found.configured):
        note = f"of the action's variance, at gap {found.window.gap} and history {found.window.history}"
        cards.append(Card("unexplained", percent(found.configured), note))
    if lag is not None:
        later = "a later" if lag.steps > 0 else "an earlier"
        note = f"the action explains {later} step best" if lag.steps else "the action acts in its own row"
        cards.append(Card("action lag", f"{lag.steps:+d}" if lag.steps else "0", note))
    return cards


def _finding(finding: Finding) -> str:
    tag = f'<span class="tag {finding.severity}">{finding.severity}</span>'
    title = f"<h3>{tag}{escape(finding.title)}</h3>"
    parts = [f'<div class="finding {finding.severity}">{title}', paragraph(finding.evidence)]
    if finding.fix:
        parts.append(f'<span class="fix">{escape(finding.fix)}</span>')
    if finding.places:
        items = "".join(f"<li>{escape(str(place))}</li>" for place in finding.places[:SHOWN_PLACES])
        rest = len(finding.places) - SHOWN_PLACES
        more = f"<li>and {rest:,} more in {JSON_FILE}</li>" if rest > 0 else ""
        parts.append(f"<details><summary>where</summary><ul>{items}{more}</ul></details>")
    return "".join([*parts, "</div>"])
