"""Markdown and figures of the results: tables, cells with a standard deviation, quoted blocks, figure files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ranker.errors import UserError
from ranker.paper.study import Sections

BLOCK = re.compile(r"(<!-- (?P<file>\S+\.md)#(?P<section>\S+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)
FORMATS = (".svg", ".png")


def spread(values: Sequence[float | None], *, percent: bool = False) -> str:
    """Mean ± sample standard deviation; only the mean for one value, an empty text for none."""
    known = pl.Series([v for v in values if v is not None], dtype=pl.Float64).drop_nans()
    if known.is_empty():
        return ""
    factor, digits = (100, 2) if percent else (1, 3)
    mean, std = known.mean(), known.std()
    assert isinstance(mean, float)
    return f"{factor * mean:.{digits}f}" + (f" ± {factor * std:.{digits}f}" if isinstance(std, float) else "")


def cell(runs: pl.DataFrame, metric: str) -> str:
    """Mean ± standard deviation and number of the completed runs, and how many diverged or ended unsettled.

    Args:
        runs: the runs of one cell.
        metric: such as ``is_click/auc``, which is given in percent.
    """
    counts = {status: runs.filter(pl.col("status") == status).height for status in ("diverged", "unsettled")}
    kept = runs.filter(pl.col("status") == "completed")
    value = spread(kept[metric].to_list(), percent=metric.endswith("/auc")) if metric in kept.columns else ""
    value += f" (n={kept.height})" if value else ""
    notes = [f"{status} {count} of {runs.height}" for status, count in counts.items() if count]
    return "; ".join([*notes, *([value] if value else [])]) or "-"


def lost_at(runs: pl.DataFrame) -> str:
    """Median first step of the divergences that ended runs; an empty text where none is known."""
    step = runs.filter(pl.col("status") == "diverged")["full_step"].cast(pl.Float64).median()
    return f"{step:g}" if isinstance(step, float) else ""


def document(title: str, provenance: str, sections: Sections) -> str:
    """A Markdown file of results: its sections under headings, in order."""
    parts = [f"# {title}\n", provenance]
    parts += [f"## {name}\n\n{text.rstrip()}\n" for name, text in sections.items()]
    return "\n".join(parts)


def quote(text: str, root: Path, pending: Callable[[Path], str] = lambda _: "") -> str:
    """A document in which every quoted block is replaced by the section that it names.

    Args:
        text: the document.
        root: the folder that the file names in the blocks are relative to.
        pending: what stands in place of a file that does not exist; an empty text if that is a mistake.

    Raises:
        UserError: a block names a file or section that does not exist.
    """

    def replaced(match: re.Match[str]) -> str:
        path = root / match["file"]
        if not path.is_file() and (text := pending(path)):
            return f"{match[1]}{text}\n{match[5]}"
        try:
            body = _section(root / match["file"], match["section"])
        except (OSError, UserError) as error:
            raise UserError(f"block {match['file']}#{match['section']}: {error}") from error
        return f"{match[1]}{body}{match[5]}"

    return BLOCK.sub(replaced, text)


def provenance(found: Mapping[str, pl.DataFrame], command: str) -> str:
    """The command, and the commits and machines named in the CSV files."""
    frames = [runs for runs in found.values() if not runs.is_empty()]
    lines = [
        f"Made by `{command}`. Every number below is computed from the CSV files beside this one;",
        "± is the standard deviation over n seeds, a dash a cell in which no run was made or none completed.",
    ]
    commits = sorted({c for runs in frames if "commit" in runs.columns for c in runs["commit"].drop_nulls()})
    machines = sorted({m for runs in frames if "machine" in runs.columns for m in runs["machine"].drop_nulls()})
    if commits:
        lines.append(f"Commit: {', '.join(commits)}. Machine: {'; '.join(machines)}.")
    return "\n".join(lines) + "\n"


def figure(*, rows: int = 1, columns: int = 1, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, without a display.

    Args:
        rows: rows of axes.
        columns: columns of axes.
        width: in inches.
        height: in inches.
        options: further options of ``matplotlib.pyplot.subplots``, such as ``sharex``.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "evenkeel"  # makes the SVG file reproducible
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    for each in picture.axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
    return picture, axes


def save(picture: Any, destination: Path) -> None:
    """Writes a figure in every format of ``FORMATS`` and closes it.

    Args:
        picture: from ``figure``.
        destination: a path without suffix.
    """
    from matplotlib import pyplot

    for ending in FORMATS:
        metadata = {"Date": None} if ending == ".svg" else None
        picture.savefig(destination.with_suffix(ending), dpi=110, metadata=metadata)
    pyplot.close(picture)


def _section(path: Path, name: str) -> str:
    for part in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        if heading.strip() == name:
            return body.strip() + "\n"
    raise UserError(f"no section '{name}'")
