"""When a day is complete, so that nothing is trained or judged on half of it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ranker.daily.days import LogDays
from ranker.daily.settings import DailySettings


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """Says whether a day is complete (``daily.complete``).

        later_rows    a later day has rows; the day after may be half there when a model is judged on it
        marker        each folder with files of the day has a file ``daily.marker``, as Spark and Hadoop write it when
                      they are done. For files in the log's own folder it is ``<marker>_<day>`` there
        delay         the day ended ``daily.delay_hours`` ago (UTC)

    Attributes:
        settings: the options.
        log: the days and their files.
        now: gives the time, UTC.
    """

    settings: DailySettings
    log: LogDays
    now: Callable[[], dt.datetime] = field(default=lambda: dt.datetime.now(dt.UTC))

    def lacking(self, *days: str) -> str:
        """What the first incomplete day lacks, in words; empty if all are complete."""
        return next((f"{day}: {why}" for day in days if (why := self._of_day(day))), "")

    def _of_day(self, day: str) -> str:
        if self.settings.complete == "marker":
            root = self.log.index.root
            return next((f"no {name} yet" for name in self._markers(day) if not root.has(name)), "")
        if self.settings.complete == "delay":
            end = dt.datetime.fromisoformat(day).replace(tzinfo=dt.UTC) + dt.timedelta(days=1)
            ready = end + dt.timedelta(hours=self.settings.delay_hours)
            if self.now() < ready:
                return f"counts as complete at {ready.isoformat(timespec='minutes')} (daily.delay_hours)"
        return ""

    def _markers(self, day: str) -> list[str]:
        folders = {str(PurePosixPath(name).parent) for name in self.log.files[day]}
        marker = self.settings.marker
        return sorted(f"{marker}_{day}" if folder == "." else f"{folder}/{marker}" for folder in folders)
