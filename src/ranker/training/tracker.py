"""What a tracker is: a Lightning logger that is also told how a run begins, ends, and what happens to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranker.atomic import write_text
from ranker.runs.run_folder import TRACKER, RunFolder

PAGE = "report.html"  # in the run folder, as scripts/report_run.py writes it


@dataclass(frozen=True)
class Tracked:
    """What a logger may want to know of a run.

    Attributes:
        folder: where the files go.
        name: the run's name in the tracker.
        group: name shared by the runs that belong together, such as the seeds of one cell.
        tags: words to filter by.
        tracked: of a resumed run, what ``trackers.position`` said at its checkpoint; None if it is not known.
        step: of a resumed run, the step of its checkpoint; None of a new run.
        kind: what the runs are compared by: the name of the optimizer.
    """

    folder: RunFolder
    name: str
    group: str
    tags: list[str]
    tracked: int | None = None
    step: int | None = None
    kind: str = ""


@dataclass(frozen=True)
class Histogram:
    """Counts of finite values in bins of equal width.

    Attributes:
        counts: number of values in each bin.
        edges: borders of the bins, one more than there are bins, rising.
    """

    counts: Sequence[float]
    edges: Sequence[float]


@dataclass(frozen=True)
class Artifact:
    """Files of a run that a tracker may keep.

    Attributes:
        kind: ``checkpoint``, ``capsule``, ``export`` or ``report``.
        path: a file or a folder.
        aliases: words for this version, such as ``best`` or ``step-100``.
    """

    kind: str
    path: Path
    aliases: tuple[str, ...] = ()


class Tracker:
    """A mix-in for Lightning loggers. Everything here may be left out; nothing is called but in the first process."""

    def begin(self, config: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
        """Opens the run in the tracker, or goes on with it.

        Args:
            config: the resolved configuration, nested.
            made_with: what identifies the run beside it: hash, commit, machine, versions.
        """

    def alert(self, title: str, text: str, *, serious: bool) -> None:
        """Tells of an event that somebody may want to act on.

        Args:
            title: a few words.
            text: one sentence.
            serious: the model is lost; otherwise the run goes on.
        """

    def histograms(self, found: Mapping[str, Histogram], step: int) -> None:
        """Keeps histograms of a step, by name."""

    def keep(self, artifact: Artifact) -> None:
        """Keeps files, if the user asked for this kind."""

    def result(self, summary: Mapping[str, Any]) -> None:
        """Takes the summary of a run that ended."""

    def close(self, *, exit_code: int) -> None:
        """Closes the run in the tracker: 0 for a run that ended, anything else for one that failed."""


def known_ids(folder: Path) -> dict[str, Any]:
    """What ``tracker.json`` says: ids of the run by tracker. Empty without a readable one."""
    try:
        found = json.loads((folder / TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_ids(folder: Path, ids: Mapping[str, Any]) -> None:
    """Adds ids to ``tracker.json``, so that a resumed run goes on under them."""
    write_text(folder / TRACKER, json.dumps({**known_ids(folder), **ids}) + "\n")


def flat_result(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a run without nesting: ``divergence/micro``, and the metrics under their own names."""
    flat = {k: v for k, v in summary.items() if isinstance(v, (str, int, float, bool))}
    for part in ("divergence", "parameters"):
        flat |= {f"{part}/{k}": v for k, v in summary.get(part, {}).items() if v is not None}
    return {**flat, **summary.get("metrics", {})}


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration with dotted keys. Lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
