from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import prepare
from ranker.data.schema import Schema
from ranker.errors import UserError


def ml_1m(folder: Path) -> Path:
    folder.mkdir()
    (folder / "ratings.dat").write_text(
        "1::10::5::978300760\n"  # 2000-12-31 22:12:40 UTC
        "2::20::3::978307300\n"  # 2001-01-01 00:01:40 UTC
        "1::20::4::978307200\n"
    )
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-1234\n")
    (folder / "movies.dat").write_text(
        "10::Star Wars: Episode IV (1977)::Action|Sci-Fi\n20::Cité des enfants, La (1995)::Drama\n", encoding="latin-1"
    )
    return folder


def test_the_older_layout_keeps_users_and_titles_in_latin_1(tmp_path: Path) -> None:
    prepare("movielens", ml_1m(tmp_path / "src"), tmp_path / "dst")
    rows = pl.concat([pl.read_parquet(f) for f in sorted((tmp_path / "dst").glob("*.parquet"))])
    assert rows["time_ms"].to_list() == [978300760000, 978307200000, 978307300000]
    assert rows["movie_id"].to_list() == [10, 20, 20]
    assert rows["rating"].to_list() == [5, 4, 3]
    assert rows["genres"].to_list() == [["Action", "Sci-Fi"], ["Drama"], ["Drama"]]
    assert rows["gender"].to_list() == ["F", "F", "M"]
    assert rows["age"].to_list() == [1, 1, 56]
    assert rows["zip_code"].to_list() == ["480", "480", "700"]
    assert rows["hour"].to_list() == [22, 0, 0]
    moments = [datetime.fromtimestamp(ms / 1000, tz=UTC) for ms in rows["time_ms"]]
    assert rows["weekday"].to_list() == [moment.weekday() for moment in moments]
    assert rows["film_age_years"][0] == pytest.approx(24.0, abs=0.02)
    schema = Schema.from_yaml(tmp_path / "dst" / "schema.yaml")
    assert schema.task_names == ["like", "five_stars", "rating"]
    assert [t.at_least for t in schema.tasks] == [4.0, 5.0, None]


def test_the_later_layout_has_no_users_and_may_lack_genres_and_years(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "ratings.csv").write_text("userId,movieId,rating,timestamp\n7,3,0.5,978307200\n8,4,4.0,978307201\n")
    (source / "movies.csv").write_text(
        'movieId,title,genres\n3,"Untitled, really",(no genres listed)\n4,"Comma, The (2000)",Comedy|Children\n'
    )
    manifest = prepare("movielens", source, tmp_path / "dst")
    rows = pl.read_parquet(next((tmp_path / "dst").glob("*.parquet")))
    assert rows["genres"].to_list() == [[], ["Comedy", "Children"]]
    assert rows["film_age_years"].is_null().to_list() == [True, False]
    assert "gender" not in rows.columns
    assert "gender" in manifest.source["notes"][0]
    assert manifest.files[0].label_rates == {"like": 0.5, "five_stars": 0.0, "rating": 2.25}


def test_the_prepared_folder_can_be_read_as_a_log(tmp_path: Path) -> None:
    prepare("movielens", ml_1m(tmp_path / "src"), tmp_path / "dst")
    log = ParquetLog(tmp_path / "dst", eval_days=1)
    assert (log.train_rows, log.num_rows) == (1, 3)
    batch = log.read(0, 3)
    assert batch.labels_BT.tolist() == [[1, 1, 5], [1, 0, 4], [0, 0, 3]]
    assert batch.onehot_BC[:, 1].tolist() == [11, 21, 21]


def test_an_id_its_table_does_not_know_is_null(tmp_path: Path) -> None:
    source = ml_1m(tmp_path / "src")
    with open(source / "ratings.dat", "a") as file:
        file.write("3::999::1::978307400\n")
    prepare("movielens", source, tmp_path / "dst")
    last = pl.read_parquet(tmp_path / "dst" / "day=2001-01-01.parquet").tail(1)
    assert last["user_id"].to_list() == [None]
    assert last["movie_id"].to_list() == [None]
    assert last["genres"].to_list() == [[]]
    assert ParquetLog(tmp_path / "dst", eval_days=1).read(3, 4).onehot_BC[0, :2].tolist() == [0, 0]


def test_a_missing_file_and_a_broken_line_are_named(tmp_path: Path) -> None:
    source = ml_1m(tmp_path / "src")
    (source / "movies.dat").write_text("10::Star Wars\n")
    with pytest.raises(UserError, match=r"movies\.dat line 1: expected 3 fields between '::', found 2"):
        prepare("movielens", source, tmp_path / "dst")
    (source / "users.dat").unlink()
    with pytest.raises(UserError, match=r"users\.dat is missing in .*src"):
        prepare("movielens", source, tmp_path / "dst")
    (source / "ratings.dat").unlink()
    with pytest.raises(UserError, match=r"no ratings\.dat or ratings\.csv in .*src"):
        prepare("movielens", source, tmp_path / "dst")


def later_layout(folder: Path) -> Path:
    folder.mkdir()
    ratings = "userId,movieId,rating,timestamp\n7,3,0.5,978307200\n8,4,4.0,978307201\n"
    (folder / "ratings.csv").write_text(ratings)
    (folder / "movies.csv").write_text("movieId,title,genres\n3,Alien (1979),Horror\n4,Brazil (1985),Comedy\n")
    return folder


def rows_of(folder: Path) -> list[dict[str, object]]:
    return pl.concat([pl.read_parquet(file) for file in sorted(folder.glob("*.parquet"))]).to_dicts()


@pytest.mark.parametrize("layout", [ml_1m, later_layout])
def test_brackets_in_the_names_of_folders_are_no_patterns(tmp_path: Path, layout) -> None:
    source = layout(tmp_path / "src [1]")
    prepare("movielens", source, tmp_path / "dst [2]")
    prepare("movielens", source.rename(tmp_path / "src"), tmp_path / "dst")
    assert rows_of((tmp_path / "dst [2]").rename(tmp_path / "dst 2")) == rows_of(tmp_path / "dst")


@pytest.mark.parametrize("layout", [ml_1m, later_layout])
@pytest.mark.parametrize("what", ["gz", "mark", "blank", "crlf"])
def test_files_may_be_compressed_and_have_marks_and_blank_lines(tmp_path: Path, layout, what: str) -> None:
    prepare("movielens", layout(tmp_path / "plain"), tmp_path / "expected")
    source = layout(tmp_path / "src")
    for file in list(source.iterdir()):
        raw = file.read_bytes()
        if what == "gz":
            file.unlink()
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(raw))
        elif what == "mark":
            file.write_bytes(b"\xef\xbb\xbf" + raw.decode("latin-1").encode())
        elif what == "blank":
            file.write_bytes(raw + b"\n\n")
        else:
            file.write_bytes(raw.replace(b"\n", b"\r\n"))
    prepare("movielens", source, tmp_path / "dst")
    assert rows_of(tmp_path / "dst") == rows_of(tmp_path / "expected")


@pytest.mark.parametrize("end", [b"9,4", b"(2 rows)\n", b"9,4,4.0,978307201,7\n", b"\x1a"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_last_line_that_is_no_row_is_named(tmp_path: Path, end: bytes, packed: bool) -> None:
    source = later_layout(tmp_path / "src")
    file = source / "ratings.csv"
    raw = file.read_bytes() + end
    file.write_bytes(raw)
    if packed:
        file.unlink()
        file = source / "ratings.csv.gz"
        file.write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match=rf"{file.name}: the last line has \d of 4 fields") as caught:
        prepare("movielens", source, tmp_path / "dst")
    assert "\n" not in str(caught.value)


def test_a_cut_off_rating_of_the_older_layout_is_named(tmp_path: Path) -> None:
    source = ml_1m(tmp_path / "src")
    with (source / "ratings.dat").open("a") as file:
        file.write("1::10::5")
    with pytest.raises(UserError, match=r"ratings.dat: the last line has 3 of 4 fields \('1::10::5'\); delete it"):
        prepare("movielens", source, tmp_path / "dst")


def test_a_broken_archive_and_a_file_in_both_forms_are_refused(tmp_path: Path) -> None:
    source = later_layout(tmp_path / "src")
    packed = gzip.compress((source / "ratings.csv").read_bytes() * 1000)
    (source / "ratings.csv.gz").write_bytes(packed)
    with pytest.raises(UserError, match=r"holds both ratings\.csv and ratings\.csv\.gz; keep one"):
        prepare("movielens", source, tmp_path / "dst")
    (source / "ratings.csv").unlink()
    (source / "ratings.csv.gz").write_bytes(packed[:-30])
    with pytest.raises(UserError, match=r"ratings.csv.gz cannot be unpacked \(.*\); fetch it again"):
        prepare("movielens", source, tmp_path / "dst")
