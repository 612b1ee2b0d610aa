"""The days of a log, and the files that hold each: what is new, and what changed after a day was trained on."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ranker.data.parquet_index import ParquetIndex, open_index
from ranker.data.prepare import prepare_cached
from ranker.data.times import DAY_MS, times_ms
from ranker.errors import UserError
from ranker.runs.log_identity import footer_digest

Files = Mapping[str, str]
"""Checksum of the footer of each file, by its name within the log."""


@dataclass(frozen=True)
class LogDays:
    """The days of a log (UTC) that have rows, in order.

    Attributes:
        index: the index of the log.
        files: by day, the files that hold rows of it.
    """

    index: ParquetIndex
    files: Mapping[str, Files]

    @classmethod
    def open(cls, cfg: DictConfig) -> LogDays:
        """Reads the footers of all files.

        Raises:
            UserError: the configuration names no log of files, or the log cannot be read.
        """
        return cls.of(open_index(_root(cfg)))

    @classmethod
    def of(cls, index: ParquetIndex) -> LogDays:
        """The days of an index."""
        digests: dict[str, str] = {}
        found: dict[str, dict[str, str]] = {}
        for group, place in enumerate(index.places):
            if place.file not in digests:
                digests[place.file] = footer_digest(index.metadata[place.file])
            for day in _days_of(index, group):
                found.setdefault(_text(day), {})[place.file] = digests[place.file]
        return cls(index, dict(sorted(found.items())))

    @property
    def names(self) -> list[str]:
        """The days, ``YYYY-MM-DD``."""
        return list(self.files)

    def after(self, day: str) -> str | None:
        """The next day with rows; None after the last one."""
        return next((name for name in self.names if name > day), None)

    def missing_around(self, day: str, *, since: Sequence[str]) -> str:
        """Days without rows before a day, back to the last decided one, and between it and the next; in words.

        Args:
            day: a day of the log.
            since: the last decided day, if there is one.
        """
        at = self.names.index(day)
        known = [*since, *(name for name in self.names[: at + 2] if name >= day)]
        numbers = [dt.date.fromisoformat(name).toordinal() for name in known]
        gaps = [(a + 1, b - 1) for a, b in pairwise(numbers) if b - a > 1]
        ends = [tuple(dt.date.fromordinal(x).isoformat() for x in gap) for gap in gaps]
        return " and ".join(first if first == last else f"{first} to {last}" for first, last in ends)

    def late(self, day: str, known: Files) -> dict[str, str]:
        """Files of a day that came or changed after it was trained on. Files that were removed do not count."""
        return {name: x for name, x in self.files.get(day, {}).items() if known.get(name) != x}


def checked_day(text: str, what: str) -> str:
    """A day as it stands in names.

    Raises:
        UserError: it is no day.
    """
    try:
        return dt.date.fromisoformat(str(text)).isoformat()
    except ValueError as error:
        raise UserError(f"{what}: '{text}' is not a day; write YYYY-MM-DD") from error


def _root(cfg: DictConfig) -> str:
    log = cfg.data.log
    source = OmegaConf.select(cfg, "data.source")
    if not source:
        raise UserError("daily training needs a log of files by day: data.source=DIR, a folder or URL with schema.yaml")
    if str(log.get("_target_", "")).endswith("prepared_from"):
        return str(prepare_cached(log.kind, source, log.cache_dir))
    return str(source)


def _days_of(index: ParquetIndex, group: int) -> list[int]:
    """The days that a row group has rows of, counted from 1970. A day inside its times may have none."""
    first, last = (int(ends[group]) // DAY_MS for ends in (index.time_min_ms, index.time_max_ms))
    if last - first < 2:
        return list(range(first, last + 1))
    name, place = index.schema.time_column, index.places[group]
    times = [times_ms(chunk, index.schema, place) for chunk in index.read(group, [name])[name].chunks]
    found: list[int] = np.unique(np.concatenate(times) // DAY_MS).tolist()
    return found


def _text(day: int) -> str:
    return (dt.date(1970, 1, 1) + dt.timedelta(days=day)).isoformat()
