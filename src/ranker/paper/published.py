"""What is published and whether it still is what its runs say: results/ and the documents that quote it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from ranker.paper import markdown
from ranker.paper.jobs import DATA, Data
from ranker.paper.store import read_runs, write_whole
from ranker.paper.study import Found, Study

QUOTING = ("README.md", "docs/reproduction.md", "results/README.md")


def folder_of(study: Study, data: Data, scale: str) -> str:
    """The folder of a study's results, within results/."""
    return f"{data.name}_{scale}" if study.needs_data else "no_data"


def command_of(study: Study, folder: str) -> str:
    """What makes a study's results again."""
    name, _, scale = folder.rpartition("_")
    return f"python scripts/reproduce.py {study.name}" + (f" data={name} scale={scale}" if study.needs_data else "")


def load_found(study: Study, studies: Sequence[Study], folder: Path) -> dict[str, pl.DataFrame]:
    """The CSV files of a study and of those it needs, by phase."""
    found: dict[str, pl.DataFrame] = {}
    for name in study.needs:
        found |= load_found(next(s for s in studies if s.name == name), studies, folder)
    return found | {phase.name: read_runs(folder / f"{phase.name}.csv") for phase in study.phases}


def render(study: Study, data: Data, found: Found, folder: str) -> str:
    """The Markdown of a study."""
    own = {phase.name: found[phase.name] for phase in study.phases}
    heading = study.title + (f": {folder.replace('_', ', ')}" if study.needs_data else "")
    return markdown.document(heading, markdown.provenance(own, command_of(study, folder)), study.sections(data, found))


def published(studies: Sequence[Study], results: Path) -> Iterable[tuple[Path, str]]:
    """Every published Markdown file and what it must hold, computed anew from the CSV files."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        name = folder.name.rpartition("_")[0]
        data = DATA.get(name, DATA["kuairand"])
        for study in studies:
            path = folder / f"{study.name}.md"
            if path.is_file():
                yield path, render(study, data, load_found(study, studies, folder), folder.name)


def differences(studies: Sequence[Study], root: Path) -> list[str]:
    """What is published and not what the CSV files say, a line each; empty where all agrees.

    Args:
        studies: all studies.
        root: the checkout, with results/ and the documents that quote it.
    """
    told = []
    for path, expected in published(studies, root / "results"):
        told += _compare(path.read_text(encoding="utf-8"), expected, str(path.relative_to(root)))
    for name in QUOTING:
        if (root / name).is_file():
            text = (root / name).read_text(encoding="utf-8")
            told += _compare(text, markdown.quote(text, root), name)
    return told


def publish(studies: Sequence[Study], root: Path) -> list[Path]:
    """Writes what the CSV files say into every published file and quoting document; returns those that changed."""
    changed = []
    for path, expected in published(studies, root / "results"):
        if path.read_text(encoding="utf-8") != expected:
            write_whole(path, expected)
            changed.append(path)
    for name in QUOTING:
        path = root / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            quoted = markdown.quote(text, root)
            if quoted != text:
                write_whole(path, quoted)
                changed.append(path)
    return changed


def _compare(text: str, expected: str, name: str) -> list[str]:
    lines = zip(_padded(text, expected), _padded(expected, text), strict=True)
    wrong = [(i, a, b) for i, (a, b) in enumerate(lines, start=1) if a != b]
    return [f"{name}:{i}: published '{a}', the runs say '{b}'" for i, a, b in wrong[:3]]


def _padded(text: str, other: str) -> list[str]:
    lines = text.splitlines()
    return lines + [""] * (len(other.splitlines()) - len(lines))
