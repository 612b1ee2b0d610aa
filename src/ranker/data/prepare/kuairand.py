"""KuaiRand-Pure: short videos shown to users of Kuaishou, with what they did.

Source: Gao et al., CIKM 2022, doi 10.1145/3511808.3557624; data at https://zenodo.org/records/10439422 (CC BY-SA 4.0).
Rows come from the standard logs; the log of randomly exposed videos is another policy's and is left alone.
Nothing known only after the impression is a feature: not play_time_ms, profile_stay_time, comment_stay_time or any
is_* of the log; nor the published table of video statistics, which counts days the log has yet to reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ranker.data.prepare.kuairand_schema import TABS, kuairand_schema
from ranker.data.prepare.recipe import TIME, Recipe, folder, one_file, scan_csv
from ranker.errors import UserError

DAY_MS = 86_400_000
CHINA_MS = 8 * 3_600_000  # upload_dt is a date, and an hour means something, in UTC+8
HISTORY_FILE = "user_sequences.parquet"
LEFT_OUT = (
    "known only after the impression (is_forward, is_hate, profile_stay_time, comment_stay_time; play_time_ms and the "
    "other is_* are labels alone), said better by time_ms (date, hourmin), the same on every row (is_rand)"
)

LOG_COLUMNS = (
    "user_id",
    "video_id",
    "date",
    "hourmin",
    TIME,
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "play_time_ms",
    "duration_ms",
    "profile_stay_time",
    "comment_stay_time",
    "is_profile_enter",
    "is_rand",
    "tab",
)
USER_TEXT = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)
USER_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
USER_CODES = tuple(f"onehot_feat{i}" for i in range(18))
USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
VIDEO_TEXT = ("video_type", "upload_type")
VIDEO_CODES = ("visible_status", "music_type")
VIDEO_SIZES = ("video_duration", "server_width", "server_height")


def kuairand_files(source: str | Path) -> list[Path]:
    """The published files that are used: the tables of users and videos, the history if it is there, and the logs.

    Args:
        source: the folder with the published files.

    Raises:
        UserError: a file is missing.
    """
    where = folder(source, "KuaiRand-Pure")
    logs = sorted(where.glob("log_standard_*.csv"))
    if not logs:
        raise UserError(f"the log is missing: no log_standard_*.csv in {where}")
    users = one_file(where, "user_features_*.csv", "the table of users")
    videos = one_file(where, "video_features_basic_*.csv", "the table of videos")
    return [users, videos, *where.glob(HISTORY_FILE), *logs]


def kuairand_recipe(files: Sequence[Path]) -> Recipe:
    """Reads the side tables and plans the preparation; the logs are not read yet.

    Args:
        files: from :func:`kuairand_files`.

    Raises:
        UserError: a column is missing, or a side table cannot be read.
    """
    users, videos = read_users(files[0]), read_videos(files[1])
    with_history = files[2].name == HISTORY_FILE
    history = read_history(files[2]) if with_history else None
    logs = files[3 if with_history else 2 :]
    text = [(users, name) for name in USER_TEXT] + [(videos, name) for name in VIDEO_TEXT]
    schema = kuairand_schema(
        codes=_sizes(users, ("user_id", *USER_FLAGS, *USER_CODES))
        | _sizes(videos, ("video_id", "author_id", "music_id", *VIDEO_CODES)),
        tags=_sizes(videos.select(pl.col("tag").explode()), ("tag",))["tag"],
        vocabularies={name: table[name].drop_nulls().unique().sort().to_list() for table, name in text},
        with_history=with_history,
    )

    def finish(rows: pl.DataFrame) -> pl.DataFrame:
        return finish_rows(rows, users=users, videos=videos, history=history)

    types = dict.fromkeys(LOG_COLUMNS, pl.Int64)
    return Recipe(
        schema=schema,
        logs={file: scan_csv(file, types).select(LOG_COLUMNS) for file in logs},
        finish=finish,
        notes=_notes(users, videos, history),
    )


def _sizes(table: pl.DataFrame, names: Sequence[str]) -> dict[str, int]:
    """How many codes 0 .. n-1 each column needs; at least one."""
    return {name: int(table.select(pl.col(name).max().fill_null(0)).item()) + 1 for name in names}


def _notes(users: pl.DataFrame, videos: pl.DataFrame, history: pl.DataFrame | None) -> list[str]:
    """What a person should know about this preparation."""
    notes = [f"left out: {LEFT_OUT}"]
    if history is None:
        notes.append(f"no {HISTORY_FILE} in the source, so the feature 'history' is left out")
    else:
        notes.append("a row has its user's history only where all of it lies in the past; earlier rows have none")
    scalar = [(table, c) for table in (users, videos) for c in table.columns if table[c].dtype != pl.List]
    constant = [name for table, name in scalar if table[name].n_unique() == 1]
    if constant:
        notes.append(f"constant in the side tables, so features that say nothing: {', '.join(constant)}")
    return notes


def _code(name: str) -> pl.Expr:
    """A small whole number; -124 and other negatives are unknown."""
    value = pl.col(name).cast(pl.Int64)
    return pl.when(value >= 0).then(value).alias(name)


def _amount(name: str) -> pl.Expr:
    """A count or a size; negatives are unknown."""
    return pl.when(pl.col(name) >= 0).then(pl.col(name)).cast(pl.Float32).alias(name)


def read_users(file: Path) -> pl.DataFrame:
    """The table of users: one row a user_id, unknown as null.

    Raises:
        UserError: a column is missing.
    """
    names = ("user_id", *USER_FLAGS, *USER_CODES, *USER_COUNTS)
    frame = scan_csv(file, dict.fromkeys(names, pl.Float64) | dict.fromkeys(USER_TEXT, pl.String))
    text = [pl.col(name).replace("UNKNOWN", None) for name in USER_TEXT]
    columns = [_code("user_id"), *text, *map(_code, (*USER_FLAGS, *USER_CODES))]
    columns += map(_amount, USER_COUNTS)
    return _collect(frame.select(columns).unique("user_id", keep="first", maintain_order=True), file)


def read_videos(file: Path) -> pl.DataFrame:
    """The table of videos: one row a video_id; authors and music numbered from 0 in the order of their published ids.

    Raises:
        UserError: a column is missing.
    """
    names = ("video_id", "author_id", "music_id", *VIDEO_CODES, *VIDEO_SIZES)
    # Ids stay whole numbers throughout: the published ones lie beyond what a 32-bit float can tell apart.
    types = dict.fromkeys(names, pl.Float64) | dict.fromkeys(("video_id", "author_id", "music_id"), pl.Int64)
    frame = scan_csv(file, types | dict.fromkeys((*VIDEO_TEXT, "upload_dt", "tag"), pl.String))
    uploaded_ms = pl.col("upload_dt").str.to_datetime("%Y-%m-%d", strict=False).dt.epoch("ms") - CHINA_MS
    columns = [
        _code("video_id"),
        *(pl.col(name).rank("dense").cast(pl.Int64).sub(1).alias(name) for name in ("author_id", "music_id")),
        *(pl.col(name).replace("UNKNOWN", None) for name in VIDEO_TEXT),
        *map(_code, VIDEO_CODES),
        *map(_amount, VIDEO_SIZES),
        uploaded_ms.alias("uploaded_ms"),
        pl.col("tag").str.split(",").list.eval(pl.element().str.strip_chars().cast(pl.Int64)).alias("tag"),
    ]
    return _collect(frame.select(columns).unique("video_id", keep="first", maintain_order=True), file)


def read_history(file: Path) -> pl.DataFrame:
    """What each user watched, oldest first, and when the last of it was.

    Raises:
        UserError: the file is no such table.
    """
    frame = pl.scan_parquet(file).select("user_id", "last_time_ms", pl.col("watch_seq").alias("history"))
    return _collect(frame.unique("user_id", keep="first", maintain_order=True), file)


def _collect(frame: pl.LazyFrame, file: Path) -> pl.DataFrame:
    try:
        return frame.collect()
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}; fetch it again") from error


def finish_rows(
    rows: pl.DataFrame, *, users: pl.DataFrame, videos: pl.DataFrame, history: pl.DataFrame | None
) -> pl.DataFrame:
    """Joins the side tables to sorted rows of the log and works out what depends on the moment.

    Args:
        rows: rows of the log in the published columns.
        users: from :func:`read_users`.
        videos: from :func:`read_videos`.
        history: from :func:`read_history`; None leaves the feature out.
    """
    frame = rows.lazy().join(users.lazy(), on="user_id", how="left", maintain_order="left")
    frame = frame.join(videos.lazy(), on="video_id", how="left", maintain_order="left")
    columns = [
        # An id that its side table does not know has no row of its own in the embedding table.
        pl.when(pl.col("user_id") <= users["user_id"].max()).then("user_id").alias("user_id"),
        pl.when(pl.col("video_id") <= videos["video_id"].max()).then("video_id").alias("video_id"),
        pl.when(pl.col("tab").is_between(0, TABS - 1)).then("tab").alias("tab"),
        (((pl.col(TIME) + CHINA_MS) // 3_600_000) % 24).alias("hour"),
        ((pl.col(TIME) - pl.col("uploaded_ms")) / DAY_MS).cast(pl.Float32).alias("upload_age_days"),
        pl.col("tag").fill_null([]),
    ]
    if history is not None:
        frame = frame.join(history.lazy(), on="user_id", how="left", maintain_order="left")
        # The table may have been made from later rows of the same log: before its last moment it would be the future.
        past = pl.when(pl.col(TIME) > pl.col("last_time_ms")).then("history")
        columns.append(past.fill_null([]).alias("history"))
    return frame.with_columns(columns).collect()
