"""Which days a log lacks around a day that is trained on."""

from __future__ import annotations

from typing import Any, cast

import pytest

from ranker.daily.days import LogDays

LOG = LogDays(index=cast(Any, None), files={f"2026-03-{day:02}": {} for day in (1, 3, 4, 8)})


@pytest.mark.parametrize(
    ("day", "since", "gap"),
    [
        ("2026-03-01", [], "2026-03-02"),
        ("2026-03-03", ["2026-03-01"], "2026-03-02"),
        ("2026-03-03", ["2026-03-02"], ""),
        ("2026-03-04", ["2026-03-01"], "2026-03-02 to 2026-03-03 and 2026-03-05 to 2026-03-07"),
    ],
)
def test_days_without_rows_are_named(day: str, since: list[str], gap: str) -> None:
    assert LOG.missing_around(day, since=since) == gap
