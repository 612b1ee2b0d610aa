"""The recipe for KuaiRand-Pure: short videos shown to users of Kuaishou, with the users' actions.

Source: Gao et al., CIKM 2022, doi 10.1145/3511808.3557624. Data: https://zenodo.org/records/10439422 (CC BY-SA 4.0).
Rows come from the standard logs. The log of randomly exposed videos has another exposure policy and is not used.
Nothing that is known only after the impression is a feature: not play_time_ms, profile_stay_time, comment_stay_time or
any is_* of the log. The published table of video statistics is not used either, because it counts later days.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from ranker.data.prepare.recipe import TIME, Recipe, collected, csv_files, folder, one_file, scan_csv
from ranker.data.schema import CategoricalFeature, DenseFeature, GroupColumn, Schema, Task
from ranker.errors import UserError

DAY_MS = 86_400_000
CHINA_MS = 8 * 3_600_000  # upload_dt and the hour of day are in UTC+8
HISTORY_FILE = "user_sequences.parquet"
HISTORY_LENGTH = 50
TABS = 15  # places in the app where a video is shown
LEFT_OUT = (
    "known only after the impression (is_forward, is_hate, profile_stay_time, comment_stay_time; play_time_ms and the "
    "other is_* are only labels), redundant with time_ms (date, hourmin), the same in every row (is_rand)"
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
    """The published files to use: the tables of users and videos, the history if it exists, and the logs.

    Args:
        source: the folder with the published files.

    Raises:
        UserError: a file is missing.
    """
    where = folder(source, "KuaiRand-Pure")
    logs = csv_files(where, "log_standard_*.csv")
    if not logs:
        raise UserError(f"the log is missing: no log_standard_*.csv in {where}")
    users = one_file(where, "user_features_*.csv", "the table of users")
    videos = one_file(where, "video_features_basic_*.csv", "the table of videos")
    return [users, videos, *where.glob(HISTORY_FILE), *logs]


def kuairand_recipe(files: Sequence[Path]) -> Recipe:
    """Reads the side tables and makes the recipe. The logs are not read yet.

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
    schema = _schema(
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


def _schema(
    *, codes: Mapping[str, int], tags: int, vocabularies: Mapping[str, Sequence[str]], with_history: bool
) -> Schema:
    """The schema: every feature of users, videos and the moment, and seven tasks.

    Args:
        codes: n of each column of whole numbers 0 .. n-1, by column name.
        tags: number of tags, which are numbered from 0.
        vocabularies: values of each text column, by column name.
        with_history: whether there is a table of earlier videos of each user.
    """
    categorical = [CategoricalFeature(name=name, num_embeddings=size) for name, size in codes.items()]
    categorical += [CategoricalFeature(name=name, vocabulary=tuple(v)) for name, v in vocabularies.items()]
    categorical.append(CategoricalFeature(name="tab", num_embeddings=TABS))
    categorical.append(CategoricalFeature(name="hour", num_embeddings=24))
    categorical.append(CategoricalFeature(name="tag", kind="multi_hot", num_embeddings=tags))
    if with_history:
        watched = CategoricalFeature(name="history", kind="sequence", table="video_id", max_length=HISTORY_LENGTH)
        categorical.append(watched)
    return Schema(
        name="kuairand",
        time_column=TIME,
        dense=_dense(),
        categorical=tuple(categorical),
        tasks=_tasks(),
        groups=(GroupColumn(name="user", column="user_id"),),
    )


def _dense() -> tuple[DenseFeature, ...]:
    return (
        *(DenseFeature(name=name, transform="log1p", fill_null=0.0) for name in USER_COUNTS),
        # Milliseconds to seconds. 0 means unknown in both: the log stores 0, the side table stores null.
        DenseFeature(name="duration_ms", transform="log1p", scale=1e-3, fill_null=0.0),
        DenseFeature(name="video_duration", transform="log1p", scale=1e-3, fill_null=0.0),
        DenseFeature(name="upload_age_days", transform="log1p", fill_null=0.0),
        DenseFeature(name="server_width", scale=1e-3, fill_null=0.0),
        DenseFeature(name="server_height", scale=1e-3, fill_null=0.0),
    )


def _tasks() -> tuple[Task, ...]:
    binary = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_profile_enter")
    watch_time = Task(name="watch_time", type="regression", column="play_time_ms", scale=1e-3, transform="log1p")
    return (*(Task(name=name) for name in binary), watch_time)


def _sizes(table: pl.DataFrame, names: Sequence[str]) -> dict[str, int]:
    """For each column, the number n of codes 0 .. n-1 that it needs. At least one."""
    return {name: int(table.select(pl.col(name).max().fill_null(0)).item()) + 1 for name in names}


def _notes(users: pl.DataFrame, videos: pl.DataFrame, history: pl.DataFrame | None) -> list[str]:
    """Notes for the user about this preparation."""
    notes = [f"left out: {LEFT_OUT}"]
    if history is None:
        notes.append(f"no {HISTORY_FILE} in the source, so the feature 'history' is left out")
    else:
        notes.append("a row has its user's history only if all of it is in the past; earlier rows have none")
    scalar = [(table, c) for table in (users, videos) for c in table.columns if table[c].dtype != pl.List]
    constant = [name for table, name in scalar if table[name].n_unique() == 1]
    if constant:
        notes.append(f"constant in the side tables, so features without information: {', '.join(constant)}")
    return notes


def _code(name: str) -> pl.Expr:
    """A small whole number. -124 and other negatives mean unknown."""
    value = pl.col(name).cast(pl.Int64)
    return pl.when(value >= 0).then(value).alias(name)


def _amount(name: str) -> pl.Expr:
    """A count or a size. Negatives mean unknown."""
    return pl.when(pl.col(name) >= 0).then(pl.col(name)).cast(pl.Float32).alias(name)


def read_users(file: Path) -> pl.DataFrame:
    """The table of users: one row per user_id, unknown values as null.

    Raises:
        UserError: a column is missing.
    """
    names = ("user_id", *USER_FLAGS, *USER_CODES, *USER_COUNTS)
    frame = scan_csv(file, dict.fromkeys(names, pl.Float64) | dict.fromkeys(USER_TEXT, pl.String))
    text = [pl.col(name).replace("UNKNOWN", None) for name in USER_TEXT]
    columns = [_code("user_id"), *text, *map(_code, (*USER_FLAGS, *USER_CODES))]
    columns += map(_amount, USER_COUNTS)
    return collected(frame.select(columns).unique("user_id", keep="first", maintain_order=True), file)


def read_videos(file: Path) -> pl.DataFrame:
    """The table of videos: one row per video_id. Authors and music are numbered from 0 in the order of their ids.

    Raises:
        UserError: a column is missing.
    """
    names = ("video_id", "author_id", "music_id", *VIDEO_CODES, *VIDEO_SIZES)
    # Ids stay integers throughout, because the published ones exceed the precision of a 32-bit float.
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
    return collected(frame.select(columns).unique("video_id", keep="first", maintain_order=True), file)


def read_history(file: Path) -> pl.DataFrame:
    """The videos that each user watched, oldest first, and the time of the last one.

    Raises:
        UserError: the file is not such a table.
    """
    frame = pl.scan_parquet(file, glob=False).select("user_id", "last_time_ms", pl.col("watch_seq").alias("history"))
    return collected(frame.unique("user_id", keep="first", maintain_order=True), file)


def finish_rows(
    rows: pl.DataFrame, *, users: pl.DataFrame, videos: pl.DataFrame, history: pl.DataFrame | None
) -> pl.DataFrame:
    """Joins the side tables to sorted rows of the log and computes the features that depend on the time.

    Args:
        rows: rows of the log in the published columns.
        users: from :func:`read_users`.
        videos: from :func:`read_videos`.
        history: from :func:`read_history`. None leaves the feature out.
    """
    frame = rows.lazy().join(users.lazy(), on="user_id", how="left", maintain_order="left")
    frame = frame.join(videos.lazy(), on="video_id", how="left", maintain_order="left")
    columns = [
        # An id beyond its side table has no row of its own in the embedding table.
        pl.when(pl.col("user_id") <= users["user_id"].max()).then("user_id").alias("user_id"),
        pl.when(pl.col("video_id") <= videos["video_id"].max()).then("video_id").alias("video_id"),
        pl.when(pl.col("tab").is_between(0, TABS - 1)).then("tab").alias("tab"),
        (((pl.col(TIME) + CHINA_MS) // 3_600_000) % 24).alias("hour"),
        ((pl.col(TIME) - pl.col("uploaded_ms")) / DAY_MS).cast(pl.Float32).alias("upload_age_days"),
        pl.col("tag").fill_null([]),
    ]
    if history is not None:
        frame = frame.join(history.lazy(), on="user_id", how="left", maintain_order="left")
        # The table may include later rows of the same log, so it is used only after its last time.
        past = pl.when(pl.col(TIME) > pl.col("last_time_ms")).then("history")
        columns.append(past.fill_null([]).alias("history"))
    return frame.with_columns(columns).collect()
