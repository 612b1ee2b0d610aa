"""All studies by name, and the published results: rendering, checking and rewriting results/ and quoting documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from ranker.atomic import write_text
from ranker.paper import (
    ablation_tables,
    analytic_studies,
    calibration,
    curve_figures,
    daily_study,
    divergence_figures,
    divergence_tables,
    midrun_figure,
    rendering,
    start_table,
    survival,
    table2,
    ways_out,
)
from ranker.paper.jobs import DATA, Data
from ranker.paper.store import read_runs
from ranker.paper.study import Found, Study

# In the order in which ``reproduce.py all`` makes them.
STUDIES: tuple[Study, ...] = (
    analytic_studies.TABLE1,
    analytic_studies.FIG3,
    calibration.CALIBRATION,
    table2.TABLE2,
    divergence_tables.TABLE3,
    survival.SURVIVAL,
    divergence_figures.FIG1,
    midrun_figure.MIDRUN,
    divergence_figures.FIG4,
    curve_figures.FIG5,
    curve_figures.FIG6,
    divergence_figures.FIG8,
    start_table.START,
    divergence_tables.HIGH_RATES,
    ablation_tables.RULE,
    ablation_tables.LAMBDA,
    ablation_tables.ADAM,
    divergence_tables.BATCH,
    divergence_tables.WINDOW,
    divergence_tables.MITIGATION,
    table2.SOFT_SHARING,
    ways_out.WAYS_OUT,
    daily_study.DAILY,
)
BY_NAME = {study.name: study for study in STUDIES}
QUOTING = ("README.md", "docs/*.md", "results/README.md")  # pages that may hold blocks of results


def folder_of(study: Study, data: Data, scale: str) -> str:
    """The folder of a study's results, relative to results/."""
    return f"{data.name}_{scale}" if study.needs_data else "no_data"


def load_found(study: Study, folder: Path) -> dict[str, pl.DataFrame]:
    """The CSV files of a study and of the studies that it needs, by phase name."""
    found: dict[str, pl.DataFrame] = {}
    for name in study.needs:
        found |= load_found(BY_NAME[name], folder)
    return found | {phase.name: read_runs(folder / f"{phase.name}.csv") for phase in study.phases}


def render(study: Study, data: Data, found: Found, folder: str) -> str:
    """The Markdown file of a study.

    Args:
        study: the study.
        data: its data set.
        found: from ``load_found``.
        folder: from ``folder_of``.
    """
    own = {phase.name: found[phase.name] for phase in study.phases}
    heading, command = study.title, f"python scripts/reproduce.py {study.name}"
    if study.needs_data:
        name, _, scale = folder.rpartition("_")
        heading += f": {folder.replace('_', ', ')}"
        command += f" data={name} scale={scale}"
    return rendering.document(heading, rendering.provenance(own, command), study.sections(data, found))


def differences(root: Path) -> list[str]:
    """The published lines that do not match the CSV files, as messages; empty if everything matches.

    Args:
        root: the checkout, with results/ and the documents that quote it.
    """
    return [line for path, text, expected in _published(root) for line in _compare(text, expected, path, root)]


def publish(root: Path) -> list[Path]:
    """Rewrites every published file and quoting document from the CSV files; returns the files that changed."""
    changed = []
    for path, text, expected in _published(root):
        if text != expected:
            write_text(path, expected)
            changed.append(path)
    return changed


def _published(root: Path) -> Iterable[tuple[Path, str, str]]:
    """Path, text and expected text of every published file, the quoting documents last."""
    for folder in sorted(path for path in (root / "results").iterdir() if path.is_dir()):
        data = DATA.get(folder.name.rpartition("_")[0], DATA["kuairand"])
        for study in STUDIES:
            path = folder / f"{study.name}.md"
            if path.is_file():
                expected = render(study, data, load_found(study, folder), folder.name)
                yield path, path.read_text(encoding="utf-8"), expected
    for path in (path for pattern in QUOTING for path in sorted(root.glob(pattern))):
        text = path.read_text(encoding="utf-8")
        yield path, text, rendering.quote(text, root, _pending)


def _pending(path: Path) -> str:
    """What a document says in place of the result of a study that was not made yet; empty for another file."""
    name, _, scale = path.parent.name.rpartition("_")
    if path.stem not in BY_NAME or name not in DATA:
        return ""
    return f"Not made yet: `python scripts/reproduce.py {path.stem} data={name} scale={scale}`."


def _compare(text: str, expected: str, path: Path, root: Path) -> list[str]:
    lines = zip(_padded(text, expected), _padded(expected, text), strict=True)
    wrong = [(i, a, b) for i, (a, b) in enumerate(lines, start=1) if a != b]
    return [f"{path.relative_to(root)}:{i}: published '{a}', computed from the runs '{b}'" for i, a, b in wrong[:3]]


def _padded(text: str, other: str) -> Sequence[str]:
    lines = text.splitlines()
    return lines + [""] * (len(other.splitlines()) - len(lines))
