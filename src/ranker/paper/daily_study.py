"""The study of daily training: what happens between days, by optimizer."""

from __future__ import annotations

from ranker.paper.daily_runs import read, rounds
from ranker.paper.study import Phase, Study

DAILY = Study(
    name="daily",
    title="Day after day",
    phases=(Phase("daily", lambda setting, _: [], read=read, rounds=rounds),),
    sections=lambda data, found: {},
)
