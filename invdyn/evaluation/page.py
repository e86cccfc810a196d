"""A self-contained HTML page: inline style, pictures inside the file, every text escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from invdyn.url_path import AnyPath

PIXELS_PER_CSS_PIXEL = 1.5

STYLE = """
:root { color-scheme: light dark; --ink: #111827; --soft: #5b6472; --line: #e3e6ea; --page: #fff; --card: #f6f7f9;
  --mark: #1d4ed8; --good: #e8f0fe; --warn: #92400e; --warn-page: #fef6e7; --warn-line: #f3d9a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa4b2; --line: #2e3540; --page: #12151a;
  --card: #1b2028; --mark: #8ab4ff; --good: #1c2a45; --warn: #f5c56b; --warn-page: #2a2214; --warn-line: #5a4720; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 2.6rem 0 .7rem; }
p { margin: .4rem 0; max-width: 50rem; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14.5rem, 1fr)); gap: .9rem; margin-top: 1.6rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem 1rem; }
.card .name { color: var(--soft); font-size: .84rem; }
.card .value { font-size: 1.75rem; font-weight: 650; line-height: 1.3; }
.card .note { font-size: .86rem; line-height: 1.45; }
.warnings { margin: 1.4rem 0 0; padding: .7rem 1rem .7rem 2.1rem; background: var(--warn-page); color: var(--warn);
  border: 1px solid var(--warn-line); border-radius: .6rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .55rem; text-align: right; border-top: 1px solid var(--line); white-space: pre; }
thead th { border-top: 0; color: var(--soft); font-weight: 550; font-size: .8rem; vertical-align: bottom;
  white-space: normal; min-width: 3.6rem; }
th:first-child, td:first-child { text-align: left; } tbody tr.chosen { background: var(--good); }
td.best { color: var(--mark); font-weight: 650; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 1.2rem; align-items: start; }
figure { margin: 0; max-width: 100%; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: .6rem;
  padding: .5rem; }
dl { display: grid; grid-template-columns: minmax(9rem, max-content) 1fr; gap: .25rem 1.4rem; margin: 0;
  font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } }
"""


@dataclass(frozen=True)
class Card:
    """A headline number and a sentence on what it means."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        header: one text per column.
        rows: cells, as many as the header.
        best: (row, column) of the cells to mark.
        chosen: the row to highlight, or None.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    chosen: int | None = None


def render_page(title: str, blocks: Iterable[str]) -> str:
    """Return a whole page."""
    body = "\n".join(blocks)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """Return a paragraph."""
    return f"<p{_class('soft', soft)}>{escape(text)}</p>"


def render_cards(cards: Iterable[Card]) -> str:
    """Return headline numbers side by side."""
    items = (
        f'<div class="card"><div class="name">{escape(card.name)}</div><div class="value">{escape(card.value)}</div>'
        f'<div class="note">{escape(card.note)}</div></div>'
        for card in cards
    )
    return f'<div class="cards">{"".join(items)}</div>'


def render_warnings(texts: Sequence[str]) -> str:
    """Return a list of warnings, or nothing."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="warnings">{items}</ul>' if texts else ""


def render_table(table: Table) -> str:
    """Return a table."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(_row(table, index) for index in range(len(table.rows)))
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'


def render_facts(facts: Mapping[str, object]) -> str:
    """Return names and values."""
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(_text(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def render_picture(path: AnyPath, caption: str) -> str:
    """Return a PNG inside the page."""
    content = path.read_bytes()
    width = round(int.from_bytes(content[16:20], "big") / PIXELS_PER_CSS_PIXEL)  # the width field of the PNG header
    data = base64.b64encode(content).decode("ascii")
    image = f'<img width="{width}" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def side_by_side(figures: Iterable[str]) -> str:
    """Return pictures next to each other as far as the page is wide."""
    return f'<div class="figures">{"".join(figures)}</div>'


def _row(table: Table, index: int) -> str:
    cells = (
        f"<td{_class('best', (index, column) in table.best)}>{escape(cell)}</td>"
        for column, cell in enumerate(table.rows[index])
    )
    return f"<tr{_class('chosen', index == table.chosen)}>{''.join(cells)}</tr>"


def _class(name: str, applies: bool) -> str:
    return f' class="{name}"' if applies else ""


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
