"""The recipe for MovieLens: ratings of films, as ML-1M's ``.dat`` files or in the later ``.csv`` layout.

Source: Harper and Konstan, ACM TiiS 2015, doi 10.1145/2827872. Data: https://grouplens.org/datasets/movielens.
Every feature is known before the rating: the user, the time and the film. No feature is aggregated over the log.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ranker.data.prepare.recipe import TIME, Recipe, check_last_line, collected, csv_files, folder, scan_csv
from ranker.data.schema import CategoricalFeature, DenseFeature, GroupColumn, Schema, Task
from ranker.errors import UserError

USER_COLUMNS = ("gender", "age", "occupation", "zip_code")
NO_GENRE = "(no genres listed)"
YEAR_MS = 365.25 * 86_400_000


def movielens_files(source: str | Path) -> list[Path]:
    """The published files to use: ratings, films and, in the older layout, users.

    Args:
        source: the folder with ``ratings.dat``, ``movies.dat``, ``users.dat``, or ``ratings.csv`` and ``movies.csv``.

    Raises:
        UserError: a file is missing.
    """
    where = folder(source, "MovieLens")
    for names in (("ratings.dat", "movies.dat", "users.dat"), ("ratings.csv", "movies.csv")):
        found = [csv_files(where, name) for name in names]
        if found[0]:
            for name, files in zip(names, found, strict=True):
                if not files:
                    raise UserError(f"{name} is missing in {where}; it must be beside {names[0]}")
            return [files[0] for files in found]
    raise UserError(f"the ratings are missing: no ratings.dat or ratings.csv in {where}")


def movielens_recipe(files: Sequence[Path]) -> Recipe:
    """Reads the films (and users) and makes the recipe. The ratings are not prepared yet.

    Args:
        files: from :func:`movielens_files`.

    Raises:
        UserError: a column is missing, or a file cannot be read.
    """
    ratings, movies, *users = files
    log = scan_dat(ratings) if users else scan_ratings(ratings)
    films, people = read_movies(movies), read_users(users[0]) if users else None
    top_user = largest(log, "user_id", ratings) if people is None else largest(people.lazy(), "user_id", users[0])
    schema = _schema(films, people, top_user=top_user)

    def finish(rows: pl.DataFrame) -> pl.DataFrame:
        return finish_rows(rows, films=films, people=people)

    return Recipe(
        schema=schema,
        logs={ratings: log},
        finish=finish,
        notes=[] if users else ["this layout has no table of users: gender, age, occupation and zip code are left out"],
    )


def scan_dat(file: Path) -> pl.LazyFrame:
    """``ratings.dat``: ``user::movie::rating::seconds``, without a header."""
    # With a one-byte separator, each "::" contains an empty column.
    types = {"user_id": pl.Int64, "_1": pl.String, "movie_id": pl.Int64, "_2": pl.String}
    types |= {"rating": pl.Float32, "_3": pl.String, "timestamp": pl.Int64}
    check_last_line(file, lambda line: line.count("::") + 1, fields=4)
    frame = pl.scan_csv(file, separator=":", has_header=False, schema=types, quote_char=None, glob=False)
    return _log(frame.filter(~pl.all_horizontal(pl.all().is_null())))  # a blank line


def scan_ratings(file: Path) -> pl.LazyFrame:
    """``ratings.csv``: ``userId,movieId,rating,timestamp``."""
    types = {"userId": pl.Int64, "movieId": pl.Int64, "rating": pl.Float32, "timestamp": pl.Int64}
    return _log(scan_csv(file, types).rename({"userId": "user_id", "movieId": "movie_id"}))


def largest(table: pl.LazyFrame, name: str, file: Path | None = None) -> int:
    """The largest id in a column. 0 if there is none.

    Raises:
        UserError: the table is read from a file that cannot be parsed.
    """
    top = table.select(pl.col(name).max().fill_null(0))
    return int((top.collect() if file is None else collected(top, file)).item())


def _log(frame: pl.LazyFrame) -> pl.LazyFrame:
    return frame.select("user_id", "movie_id", "rating", (pl.col("timestamp") * 1000).alias(TIME))


def read_movies(file: Path) -> pl.DataFrame:
    """Films: movie_id, genres as a list, and the year from the last brackets of the title, or null.

    Raises:
        UserError: a line is not ``id::title::genres``, or a column is missing.
    """
    if ".csv" in file.suffixes:
        types = {"movieId": pl.Int64, "title": pl.String, "genres": pl.String}
        frame = collected(scan_csv(file, types).rename({"movieId": "movie_id"}), file)
    else:
        rows = _split(file, 3)
        frame = pl.DataFrame(rows, schema=["movie_id", "title", "genres"], orient="row")
    genres = pl.col("genres").str.split("|").list.eval(pl.element().filter(pl.element() != NO_GENRE))
    return frame.select(
        pl.col("movie_id").cast(pl.Int64),
        genres.fill_null([]).alias("genres"),
        pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Float64).alias("year"),
    ).unique("movie_id", keep="first", maintain_order=True)


def read_users(file: Path) -> pl.DataFrame:
    """Users of ML-1M: user_id, gender, age group, occupation, zip code.

    Raises:
        UserError: a line is not ``id::gender::age::occupation::zip``.
    """
    frame = pl.DataFrame(_split(file, 5), schema=["user_id", *USER_COLUMNS], orient="row")
    numbers = [pl.col(name).cast(pl.Int64) for name in ("user_id", "age", "occupation")]
    # The first three digits identify the region. More digits would almost identify the user.
    return frame.with_columns(*numbers, pl.col("zip_code").str.head(3)).unique("user_id", keep="first")


def _split(file: Path, fields: int) -> list[list[str]]:
    """Lines of a ``::``-separated file in latin-1. There are a few thousand, so plain Python is fast enough."""
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file} cannot be unpacked ({error}); fetch it again") from error
    # The published titles are in latin-1. A byte order mark shows that somebody has converted the file.
    text = raw.decode("utf-8-sig" if raw.startswith(codecs.BOM_UTF8) else "latin-1")
    rows = [line.split("::") for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != fields:
            raise UserError(f"{file} line {number}: expected {fields} fields between '::', found {len(row)}")
    return rows


def _schema(films: pl.DataFrame, people: pl.DataFrame | None, *, top_user: int) -> Schema:
    genres = films["genres"].explode().drop_nulls().unique().sort().to_list()
    categorical = [
        CategoricalFeature(name="user_id", num_embeddings=top_user + 1),
        CategoricalFeature(name="movie_id", num_embeddings=largest(films.lazy(), "movie_id") + 1),
        CategoricalFeature(name="genres", kind="multi_hot", vocabulary=tuple(genres)),
        CategoricalFeature(name="hour", num_embeddings=24),
        CategoricalFeature(name="weekday", num_embeddings=7),
    ]
    for name in USER_COLUMNS if people is not None else ():
        known = people[name].drop_nulls().unique().sort().to_list() if people is not None else []
        categorical.append(CategoricalFeature(name=name, vocabulary=tuple(known)))
    return Schema(
        name="movielens",
        time_column=TIME,
        # Age of the film at the time of rating. Films without a year in the title count as new.
        dense=(DenseFeature(name="film_age_years", transform="log1p", fill_null=0.0),),
        categorical=tuple(categorical),
        tasks=(
            Task(name="like", column="rating", at_least=4.0),
            Task(name="five_stars", column="rating", at_least=5.0),
            Task(name="rating", type="regression"),
        ),
        groups=(GroupColumn(name="user", column="user_id"),),
    )


def finish_rows(rows: pl.DataFrame, *, films: pl.DataFrame, people: pl.DataFrame | None) -> pl.DataFrame:
    """Joins films and users to sorted ratings and computes the features that depend on the time.

    Args:
        rows: ratings with user_id, movie_id, rating and time_ms.
        films: from :func:`read_movies`.
        people: from :func:`read_users`. None if there is no such table.
    """
    frame = _known(rows, films, "movie_id").join(films, on="movie_id", how="left", maintain_order="left")
    if people is not None:
        frame = _known(frame, people, "user_id").join(people, on="user_id", how="left", maintain_order="left")
    hours = pl.col(TIME) // 3_600_000
    return frame.with_columns(
        pl.col("genres").fill_null([]),
        (hours % 24).alias("hour"),
        ((hours // 24 + 3) % 7).alias("weekday"),  # 1970-01-01 was a Thursday; Monday is 0
        (1970 + pl.col(TIME) / YEAR_MS - pl.col("year")).cast(pl.Float32).alias("film_age_years"),
    )


def _known(rows: pl.DataFrame, table: pl.DataFrame, name: str) -> pl.DataFrame:
    """Replaces ids beyond their table by null, because they have no embedding row of their own."""
    return rows.with_columns(pl.when(pl.col(name) <= largest(table.lazy(), name)).then(name).alias(name))
