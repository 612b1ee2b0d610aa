"""The skeleton of a page: one HTML file with its style and script, headings, tables and grids of charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple


class Section(NamedTuple):
    """A part of a page: the name of its anchor, its heading and its HTML. Without HTML it is left out."""

    key: str
    title: str
    body: str


class Cell(NamedTuple):
    """A cell of a table: its HTML, and the number by which its column is sorted (default: its text)."""

    html: str
    order: float | None = None


def document(title: str, *, head: str, sections: Sequence[Section]) -> str:
    """A whole page, which loads nothing from the network and is readable in light and dark mode.

    Args:
        title: of the browser's tab, plain text.
        head: HTML of the header.
        sections: in order; a list of links to them stands on top.
    """
    here = files(__package__)
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{html}</section>' for key, name, html in shown)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<header>{head}</header><nav>{links}</nav><main>{body}</main>"
        f'<div id="readout" hidden></div><script>{script}</script></body></html>\n'
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str | Cell]], *, sortable: bool = False, search: str = ""
) -> str:
    """A table.

    Args:
        head: names of the columns, plain text.
        rows: cells as HTML.
        sortable: a click on a name sorts by the column: numbers by value, before texts.
        search: label of a field that hides the rows without the words typed; none if empty.
    """
    names = (f'<button type="button">{escape(name)}</button>' if sortable else escape(name) for name in head)
    top = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    field = f'<label class="search">{escape(search)} <input type="search"></label>' if search else ""
    kind = ' class="sortable"' if sortable else ""
    return f'{field}<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{cell}</td>"
    order = "" if cell.order is None else f' data-order="{cell.order:.9g}"'
    return f"<td{order}>{cell.html}</td>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their values, plain text, side by side."""
    return "<dl>" + "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in pairs) + "</dl>"


def grid(figures: Iterable[str]) -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="grid">{"".join(figures)}</div>'


def missing(text: str) -> str:
    """A remark in place of something that is not known."""
    return f'<p class="missing">{escape(text)}</p>'
