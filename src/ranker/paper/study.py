"""What a study is: the runs that a table or figure needs, and the functions that render it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ranker.paper.jobs import Data, Job, Setting
from ranker.paper.store import collect

Found = Mapping[str, pl.DataFrame]
"""Results so far by phase name: the contents of the CSV files in results/."""

Sections = dict[str, str]
"""Markdown by section name. A document can quote a section: ``<!-- results/FOLDER/STUDY.md#NAME -->``."""

Reader = Callable[[Setting, Path, Sequence[Job]], tuple[pl.DataFrame, list[Job]]]


@dataclass(frozen=True)
class Round:
    """Jobs that can run together, and their sweep folder."""

    folder: Path
    jobs: Sequence[Job]


@dataclass(frozen=True)
class Phase:
    """One sweep of a study, or several where jobs depend on the runs of others.

    Attributes:
        name: of its CSV file, unique among all studies.
        jobs: the jobs to run, given the results of earlier phases.
        read: reads the sweep folder; returns the rows of the CSV and the jobs without a run.
        rounds: instead of jobs, where they depend on the runs of earlier ones: given the sweep folder, round after
            round, each asked for when the one before was launched.
    """

    name: str
    jobs: Callable[[Setting, Found], list[Job]]
    read: Reader = lambda setting, folder, jobs: collect(folder, jobs)  # noqa: ARG005
    rounds: Callable[[Setting, Path], Iterator[Round]] | None = None


@dataclass(frozen=True)
class Study:
    """A table or a figure.

    Attributes:
        name: the name on the command line.
        title: the heading of its Markdown file.
        phases: its sweeps, in order.
        sections: makes the Markdown from the CSV files only.
        draw: draws the figure from the CSV files only, to a path without suffix; None for a table.
        needs: names of the studies that must be made first.
        needs_data: False if the result does not depend on the data set, so that it is made only once.
    """

    name: str
    title: str
    phases: tuple[Phase, ...]
    sections: Callable[[Data, Found], Sections]
    draw: Callable[[Data, Found, Path], None] | None = None
    needs: tuple[str, ...] = ()
    needs_data: bool = True
