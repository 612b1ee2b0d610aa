"""A study: which runs a table or figure asks for, and what is written from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ranker.paper.jobs import Data, Job, Setting
from ranker.paper.store import collect

Found = Mapping[str, pl.DataFrame]
"""What is known so far, by name of phase: what stands in the CSV files of results/."""

Sections = dict[str, str]
"""Markdown by name; a name may be quoted by a document: ``<!-- results/FOLDER/STUDY.md#NAME -->``."""

Reader = Callable[[Setting, Path, Sequence[Job]], tuple[pl.DataFrame, list[Job]]]


@dataclass(frozen=True)
class Phase:
    """One sweep of a study.

    Attributes:
        name: of its CSV, unique among all studies.
        jobs: what to run, given what earlier phases found.
        read: from the sweep's folder to the rows of the CSV, and the jobs that have no run.
    """

    name: str
    jobs: Callable[[Setting, Found], list[Job]]
    read: Reader = lambda setting, folder, jobs: collect(folder, jobs)  # noqa: ARG005


@dataclass(frozen=True)
class Study:
    """A table or a figure.

    Attributes:
        name: as on the command line.
        title: what it shows.
        phases: its sweeps, in order.
        sections: the Markdown, from the CSV files alone.
        draw: the picture, from the CSV files alone, to a path without an ending; None where there is none.
        needs: names of studies whose phases are made first.
        needs_data: whether it is made once for each data set, or once.
    """

    name: str
    title: str
    phases: tuple[Phase, ...]
    sections: Callable[[Data, Found], Sections]
    draw: Callable[[Data, Found, Path], None] | None = None
    needs: tuple[str, ...] = ()
    needs_data: bool = True
