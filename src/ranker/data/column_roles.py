"""What a raw column is, as far as its values and its name tell: the rules behind a proposed schema.

Names are looked at by their words (``is_click`` has the words is and click). They decide only where values cannot: a
0 or 1 may be a label or a property of the user, and an integer may be an id or a count.
"""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pyarrow as pa

from ranker.data.column_profile import ColumnProfile
from ranker.data.raw_log import RawProfile
from ranker.data.raw_values import TIME_FORMATS, as_time_ms
from ranker.data.schema import TIME_UNITS
from ranker.data.times import DAY_MS


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OUTCOMES = _words(
    "click clicked clicks like liked likes follow followed share shared forward forwarded comment commented buy bought "
    "purchase purchased order ordered convert converted conversion install installed cart favorite favorited favourite "
    "fav subscribe subscribed hate dislike disliked view viewed play played watch watched skip skipped finish finished "
    "complete completed label target engaged engagement enter entered save saved download downloaded apply applied "
    "book booked contact contacted reply replied open opened reserve upvote downvote"
)
SPENT = _words("watch watched play played dwell stay spent view viewing viewed read reading listen listened")
SPENT_IN = _words("time ms sec secs second seconds minutes duration length")
GRADES = _words("rating ratings stars score grade")
MONEY = _words("revenue gmv spend paid")
IDS = _words(
    "id ids uid gid pid iid sku code key hash uuid guid zip user item author video music category cat type tab page "
    "os device city country region lang language brand model channel slot segment group seller store shop"
)
COUNTS = _words("num count cnt number age days hours price amount total sum avg mean share rate size")
# Of whole numbers with more values than a label has: how often something happened, whatever it happened to.
COUNTED = _words(
    "counts views clicks likes plays orders purchases impressions visits followers fans comments shares reviews sales"
)
TIMES = _words("time timestamp ts datetime at date created event logged")
OTHER_TIMES = _words("update updated upload register registered birth expire expires end last")
HISTORY = _words("history hist seq sequence recent last past clicked viewed watched")
YEARS_MS = (946_684_800_000, 4_102_444_800_000)  # 2000 .. 2100
READS = 0.98  # share of values that must be readable as something
FEW = 50  # distinct values that are listed as a vocabulary
LABELLED = 20  # positives and negatives that a label needs
HEAVY = 5.0  # times that the upper tail is as long as the lower part


def words(name: str) -> list[str]:
    """The words of a name: ``isClick2`` and ``is_click_2`` have is, click and 2."""
    return re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())


def reads_as(column: ColumnProfile) -> str:
    """``integer``, ``float``, ``boolean``, ``string``, ``time``, ``list`` or ``other``, also of a column of texts."""
    if column.kind == "float" and column.whole and column.numbers:
        return "integer"  # integers with nulls, as pandas writes them
    if column.kind != "string" or not column.known:
        return column.kind
    if column.booleans >= READS * column.known:
        return "boolean"
    if column.numbers + column.grouped >= READS * column.known:
        return "integer" if column.whole else "float"
    return "string"


def is_binary(column: ColumnProfile) -> bool:
    """Whether it holds two values that are 0 and 1, or true and false."""
    if reads_as(column) == "boolean":
        return column.distinct.estimate >= 2
    return reads_as(column) == "integer" and (column.low, column.high) == (0.0, 1.0)


def is_outcome(name: str, column: ColumnProfile) -> str:
    """``binary`` or ``regression`` for what happened after a row was shown, by name and values; else empty."""
    seen, kind = set(words(name)), reads_as(column)
    if is_binary(column):
        return "binary" if seen & OUTCOMES and not seen & COUNTS else ""
    if kind not in ("integer", "float") or column.high <= column.low:
        return ""
    spent = bool(seen & SPENT) and (bool(seen & SPENT_IN) or name.lower() == "dwell")
    return "regression" if spent or seen & GRADES or seen & MONEY else ""


def is_id(name: str, column: ColumnProfile) -> bool:
    """Whether integers are names of something rather than amounts."""
    seen = words(name)
    if reads_as(column) != "integer" or set(seen) & (COUNTS | COUNTED):
        return False
    return bool(set(seen) & IDS) or column.high >= 2**24 or seen[-1:] == ["id"]


def is_written_day(column: ColumnProfile) -> bool:
    """Whether integers are days such as 20261123."""
    if reads_as(column) != "integer":
        return False
    return all(
        19900101 <= v < 21010101 and 1 <= v // 100 % 100 <= 12 and 1 <= v % 100 <= 31 for v in (column.low, column.high)
    )


def time_format(column: ColumnProfile, values: pa.ChunkedArray) -> str:
    """How a column can be read as a time: a unit, a format, ``typed`` for Arrow's own; empty if it cannot.

    Args:
        column: its summary.
        values: some of its values.
    """
    if column.kind == "time":
        return "typed"
    if reads_as(column) in ("integer", "float") and column.known:
        return next(
            (u for u, f in TIME_UNITS.items() if YEARS_MS[0] <= column.low * f and column.high * f < YEARS_MS[1]), ""
        )
    if column.kind != "string":
        return ""
    frame = pl.DataFrame({"t": pl.Series(pl.from_arrow(values)).cast(pl.String)}).drop_nulls().head(2000)
    if not len(frame):
        return ""
    shares = {}
    for how in TIME_FORMATS:
        read = frame.select(as_time_ms("t", pl.String(), how))["t"].drop_nulls()
        sane = read.is_between(*YEARS_MS)
        shares[how] = int(sane.sum()) / len(frame)
    best = max(shares, key=lambda how: shares[how])
    return best if shares[best] >= READS else ""


def time_columns(profile: RawProfile) -> dict[str, str]:
    """Columns that can order a log, the likeliest first, with how they are read."""
    found = {}
    for name, column in profile.columns.items():
        how = time_format(column, profile.sample[name])
        # A day is a time too, but one that orders the rows is better.
        if (how and column.low < column.high) or (how and column.kind == "string" and column.distinct.estimate > 1):
            found[name] = how

    def rank(name: str) -> tuple[int, int, float]:
        seen, column = set(words(name)), profile.columns[name]
        named = bool(seen & TIMES) - 2 * bool(seen & OTHER_TIMES)
        unread = column.null_share > 0.5
        return (named - 3 * unread, int(not _is_day(profile, name, found[name])), column.distinct.estimate)

    return {name: found[name] for name in sorted(found, key=rank, reverse=True)}


def _is_day(profile: RawProfile, name: str, how: str) -> bool:
    """Whether all times are midnights."""
    column = pl.Series(name, pl.from_arrow(profile.sample[name]))
    times = pl.DataFrame({name: column}).select(as_time_ms(name, column.dtype, how))[name].drop_nulls()
    return bool((times % DAY_MS == 0).all())


def is_heavy(values: np.ndarray) -> bool:
    """Whether amounts have a tail that log1p shortens: far above the median for some rows."""
    if len(values) < 50:
        return False
    low, middle, high = (float(v) for v in np.quantile(values, (0.01, 0.5, 0.99)))
    top = float(values.max())
    return low >= -1e-9 and top > 10 and high - middle > HEAVY * max(middle - low, 1e-9)
