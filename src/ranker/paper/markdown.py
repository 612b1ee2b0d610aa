"""Markdown for the results: tables, cells with a spread, and the blocks that documents quote."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import polars as pl

from ranker.errors import UserError
from ranker.paper.study import Sections
from ranker.reports.comparison import as_markdown

BLOCK = re.compile(r"(<!-- (?P<file>\S+\.md)#(?P<section>\S+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return as_markdown(header, rows)


def spread(values: Sequence[float | None], *, percent: bool = False) -> str:
    """Mean ± sample standard deviation; the mean alone of one value, nothing of none."""
    known = pl.Series([v for v in values if v is not None], dtype=pl.Float64).drop_nans()
    if known.is_empty():
        return ""
    factor, digits = (100, 2) if percent else (1, 3)
    mean, std = known.mean(), known.std()
    assert isinstance(mean, float)
    return f"{factor * mean:.{digits}f}" + (f" ± {factor * std:.{digits}f}" if isinstance(std, float) else "")


def cell(runs: pl.DataFrame, metric: str) -> str:
    """Mean ± deviation of the runs that completed, and how many were lost.

    Args:
        runs: those of one cell.
        metric: such as ``is_click/auc``, which is given in percent.
    """
    lost = runs.filter(pl.col("status") == "diverged").height
    kept = runs.filter(pl.col("status") == "completed")
    value = spread(kept[metric].to_list(), percent=metric.endswith("/auc")) if metric in kept.columns else ""
    notes = [f"diverged {lost} of {runs.height}"] if lost else []
    return "; ".join([*notes, *([value] if value else [])]) or "-"


def document(title: str, provenance: str, sections: Sections) -> str:
    """A file of results: its sections under headings, in order."""
    parts = [f"# {title}\n", provenance]
    parts += [f"## {name}\n\n{text.rstrip()}\n" for name, text in sections.items()]
    return "\n".join(parts)


def section_of(text: str, name: str) -> str:
    """One section of such a file.

    Raises:
        UserError: there is none of that name.
    """
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        if heading.strip() == name:
            return body.strip() + "\n"
    raise UserError(f"no section '{name}'")


def quote(text: str, root: Path, read: Callable[[Path], str] | None = None) -> str:
    """A document with every quoted block replaced by the section it names.

    Args:
        text: the document.
        root: the folder that the names of files start from.
        read: gives a file's text; reads it from disk by default.

    Raises:
        UserError: a block names a file or a section that is not there.
    """
    read = read or (lambda path: path.read_text(encoding="utf-8"))

    def replaced(match: re.Match[str]) -> str:
        path = root / match["file"]
        try:
            return f"{match[1]}{section_of(read(path), match['section'])}{match[5]}"
        except (OSError, UserError) as error:
            raise UserError(f"block {match['file']}#{match['section']}: {error}") from error

    return BLOCK.sub(replaced, text)


def provenance(found: Mapping[str, pl.DataFrame], command: str) -> str:
    """The command, and the commit, machine and seeds that the CSV files name."""
    frames = [runs for runs in found.values() if not runs.is_empty()]
    lines = [
        f"Made by `{command}`. Every number below is computed from the CSV files beside this one;",
        "± is the standard deviation over seeds, a dash a cell in which no run was made or none completed.",
    ]
    commits = sorted({c for runs in frames if "commit" in runs.columns for c in runs["commit"].drop_nulls()})
    machines = sorted({m for runs in frames if "machine" in runs.columns for m in runs["machine"].drop_nulls()})
    if commits:
        lines.append(f"Commit: {', '.join(commits)}. Machine: {'; '.join(machines)}.")
    return "\n".join(lines) + "\n"
