from __future__ import annotations

import gzip
import os
from pathlib import Path

import polars as pl
import pytest

from ranker.data.manifest import Manifest
from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import prepare
from ranker.data.prepare.kuairand import LOG_COLUMNS, USER_CODES
from ranker.data.schema import Schema
from ranker.errors import UserError

DATA = Path(os.environ.get("EVENKEEL_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))
SLICE = DATA / "kuairand_pure_slice"
START = 1_650_852_000_000  # 2022-04-25 02:00 UTC
HOUR = 3_600_000
AFTERWARDS = {
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "play_time_ms",
    "profile_stay_time",
    "comment_stay_time",
    "is_profile_enter",
}


def row(**values: int) -> str:
    plain = dict.fromkeys(LOG_COLUMNS, 0) | {"time_ms": START, "duration_ms": 12_000, "tab": 1} | values
    return ",".join(str(plain[name]) for name in LOG_COLUMNS)


def source(folder: Path, rows: list[str], *, history: bool = True) -> Path:
    folder.mkdir()
    log = "\n".join([",".join(f'"{name}"' for name in LOG_COLUMNS), *rows]) + "\n"
    (folder / "log_standard_4_25_pure.csv").write_text(log)
    (folder / "log_random_4_25_pure.csv").write_text("this,is,never\nopened,or,read\n")
    codes = [f"onehot_feat{i}" for i in range(18)]
    user_columns = (
        "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
        "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,"
        "register_days,register_days_range," + ",".join(codes)
    )
    (folder / "user_features_pure.csv").write_text(
        f"{user_columns}\n"
        f'0,full_active,0,-124,1,514,500+,150,"[100,1k)",34,"[30,60)",799,730+,{",".join("12" for _ in codes)}\n'
        f'1,UNKNOWN,0,1,0,0,0,2,"[1,10)",0,0,14,15-30,{",".join("" if i > 3 else "3.0" for i in range(18))}\n'
    )
    (folder / "video_features_basic_pure.csv").write_text(
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
        "server_height,music_id,music_type,tag\n"
        '0,7349781,NORMAL,2022-04-10,LongImport,0.0,87433.0,720.0,1280.0,9155697141,9.0,"39, 4"\n'
        "1,12,AD,2022-04-11,Web,0.0,,720.0,1280.0,9155697142,,\n"
    )
    if history:
        table = {"user_id": [0], "last_time_ms": [START], "watch_seq": [[1, 0, 1]]}
        pl.DataFrame(table).write_parquet(folder / "user_sequences.parquet")
    return folder


def prepared(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(f) for f in sorted(folder.glob("*.parquet"))])


def test_side_tables_are_joined_and_dirt_becomes_null(tmp_path: Path) -> None:
    prepare("kuairand", source(tmp_path / "src", [row(), row(user_id=1, video_id=1)]), tmp_path / "dst")
    a, b = prepared(tmp_path / "dst").to_dicts()
    assert (a["user_active_degree"], b["user_active_degree"]) == ("full_active", None)
    assert (a["is_live_streamer"], b["is_live_streamer"]) == (None, 1)  # -124 is unknown
    assert (a["onehot_feat17"], b["onehot_feat3"], b["onehot_feat4"]) == (12, 3, None)
    assert (a["fans_user_num"], a["fans_user_num_range"]) == (150, "[100,1k)")
    assert (a["author_id"], b["author_id"]) == (1, 0)  # numbered in the order of the published ids
    assert (a["music_id"], b["music_id"]) == (0, 1)  # 9155697141 and ...42 are one and the same as 32-bit floats
    assert (a["music_type"], b["music_type"]) == (9, None)
    assert (a["video_duration"], b["video_duration"]) == (87433, None)
    assert (a["tag"], b["tag"]) == ([39, 4], [])
    assert a["hour"] == 10  # in China
    # Uploaded on 04-10, which began at 16:00 UTC of 04-09.
    assert a["upload_age_days"] == pytest.approx(15 + 10 / 24, abs=1e-4)


def test_what_no_side_table_knows_is_null_and_the_schema_has_an_answer_to_it(tmp_path: Path) -> None:
    rows = [row(), row(user_id=1, video_id=1), row(user_id=999, video_id=999, tab=99, time_ms=START + 1)]
    prepare("kuairand", source(tmp_path / "src", rows), tmp_path / "dst")
    schema = Schema.from_yaml(tmp_path / "dst" / "schema.yaml")
    assert all(feature.fill_null is not None for feature in schema.dense)
    last = prepared(tmp_path / "dst").to_dicts()[-1]
    assert (last["user_id"], last["video_id"], last["tab"]) == (None, None, None)
    assert last["tag"] == []


def test_a_history_is_given_only_after_the_last_video_in_it(tmp_path: Path) -> None:
    rows = [row(time_ms=START + moment, user_id=user) for moment in (-1, 0, 1) for user in (0, 1)]
    prepare("kuairand", source(tmp_path / "src", rows), tmp_path / "dst")
    histories = {(r["time_ms"] - START, r["user_id"]): r["history"] for r in prepared(tmp_path / "dst").to_dicts()}
    assert histories.pop((1, 0)) == [1, 0, 1]
    assert list(histories.values()) == [[]] * 5


def test_without_a_table_of_histories_the_feature_is_left_out_and_this_is_said(tmp_path: Path) -> None:
    manifest = prepare("kuairand", source(tmp_path / "src", [row()], history=False), tmp_path / "dst")
    assert "history" not in prepared(tmp_path / "dst").columns
    assert "history" not in Schema.from_yaml(tmp_path / "dst" / "schema.yaml").feature_names
    assert any("'history' is left out" in note for note in manifest.source["notes"])


def test_rows_are_cut_by_utc_day_sorted_and_freed_of_exact_duplicates_alone(tmp_path: Path) -> None:
    rows = [row(time_ms=START + 30 * HOUR), row(), row(is_click=1), row(), row(time_ms=START - 3 * HOUR)]
    manifest = prepare("kuairand", source(tmp_path / "src", rows), tmp_path / "dst")
    assert manifest.source["duplicates_dropped"] == 1
    assert [(f.path, f.rows) for f in manifest.files] == [
        ("day=2022-04-24.parquet", 1),
        ("day=2022-04-25.parquet", 2),
        ("day=2022-04-26.parquet", 1),
    ]
    assert prepared(tmp_path / "dst")["is_click"].to_list() == [0, 0, 1, 0]


def test_all_standard_logs_are_taken_whatever_the_order_of_their_columns(tmp_path: Path) -> None:
    folder = source(tmp_path / "src", [row()])
    names = list(reversed(LOG_COLUMNS))
    values = dict(zip(LOG_COLUMNS, row(time_ms=START + 5).split(","), strict=True))
    text = ",".join(names) + "\n" + ",".join(values[n] for n in names) + "\n"
    (folder / "log_standard_5_01_pure.csv").write_text(text)
    prepare("kuairand", folder, tmp_path / "dst")
    assert prepared(tmp_path / "dst")["time_ms"].to_list() == [START, START + 5]


@pytest.mark.parametrize("name", ["user_features_pure.csv", "video_features_basic_pure.csv"])
def test_a_missing_side_table_is_named_with_its_folder(tmp_path: Path, name: str) -> None:
    folder = source(tmp_path / "src", [row()])
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name.removesuffix('pure.csv')}.*in {folder}"):
        prepare("kuairand", folder, tmp_path / "dst")


def test_a_log_without_a_column_is_refused_by_name(tmp_path: Path) -> None:
    folder = source(tmp_path / "src", [row()])
    log = folder / "log_standard_4_25_pure.csv"
    log.write_text(log.read_text().replace('"long_view"', '"long_views"'))
    with pytest.raises(UserError, match="no column 'long_view'; did you mean 'long_views'"):
        prepare("kuairand", folder, tmp_path / "dst")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not SLICE.is_dir():
        pytest.skip(f"needs KuaiRand-Pure's slice in {SLICE}; set EVENKEEL_DATA to the folder that holds it")
    target = tmp_path_factory.mktemp("kuairand") / "prepared"
    prepare("kuairand", SLICE, target)
    return target


def test_the_slice_gives_the_rows_days_and_label_rates_it_is_known_for(real: Path) -> None:
    manifest = Manifest.read(real)
    assert manifest is not None
    assert (manifest.source["rows_read"], manifest.source["duplicates_dropped"]) == (228_329, 5_460)
    assert manifest.rows == 222_869
    assert [f.path for f in manifest.files][:: len(manifest.files) - 1] == [
        "day=2022-04-24.parquet",
        "day=2022-05-08.parquet",
    ]
    frame = prepared(real)
    assert len(frame) == 222_869
    assert frame["time_ms"].is_sorted()
    rates = {name: frame[name].mean() for name in ("is_click", "long_view", "is_like", "is_comment", "is_follow")}
    known = {"is_click": 0.442, "long_view": 0.311, "is_like": 0.0172, "is_comment": 0.0025, "is_follow": 0.0013}
    # The published rates include the duplicates, which were seldom clicked, so all rates are slightly higher here.
    assert rates == pytest.approx(known, rel=0.05)


def test_nothing_known_after_the_impression_is_a_feature_of_the_slice(real: Path) -> None:
    schema = Schema.from_yaml(real / "schema.yaml")
    features = {f.column for f in (*schema.dense, *schema.categorical)}
    assert not features & AFTERWARDS
    assert not features & {task.column for task in schema.tasks}
    assert set(prepared(real).columns) == set(schema.columns())


def test_all_features_of_users_and_videos_are_used_on_the_slice(real: Path) -> None:
    names = set(Schema.from_yaml(real / "schema.yaml").feature_names)
    users = set(pl.read_csv(SLICE / "user_features_pure.csv", n_rows=1).columns)
    videos = set(pl.read_csv(SLICE / "video_features_basic_pure.csv", n_rows=1).columns)
    assert set(USER_CODES) < users
    assert users - names == set()
    assert videos - names == {"upload_dt"}  # it is in upload_age_days
    assert {"tab", "hour", "history", "duration_ms", "upload_age_days"} < names


def test_the_slice_reads_as_a_log_with_the_side_table_of_each_row(real: Path) -> None:
    log = ParquetLog(real, eval_days=1)
    assert log.num_rows == 222_869
    batch = log.read(100_000, 101_000)
    frame = prepared(real).slice(100_000, 1_000)
    users = pl.read_csv(SLICE / "user_features_pure.csv")
    fans = frame.select("user_id").join(users, on="user_id", how="left", maintain_order="left")["fans_user_num"]
    column = [f.name for f in log.schema.dense].index("fans_user_num")
    assert batch.dense_BF[:, column].expm1().tolist() == pytest.approx(fans.to_list(), rel=1e-4, abs=1e-4)
    assert batch.dense_BF.isfinite().all()
    assert (batch.ragged["history"].offsets.diff() > 0).float().mean() > 0.9


@pytest.mark.parametrize("what", ["gz", "mark", "blank"])
def test_files_may_be_compressed_and_have_marks_and_blank_lines(tmp_path: Path, what: str) -> None:
    rows = [row(), row(user_id=1, video_id=1, time_ms=START + HOUR)]
    prepare("kuairand", source(tmp_path / "plain", rows), tmp_path / "expected")
    changed = source(tmp_path / "src", rows)
    for file in list(changed.glob("*.csv")):
        raw = file.read_bytes()
        if what == "gz":
            file.unlink()
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(raw))
        else:
            file.write_bytes(b"\xef\xbb\xbf" + raw if what == "mark" else raw + b"\n")
    prepare("kuairand", changed, tmp_path / "dst")
    assert prepared(tmp_path / "dst").equals(prepared(tmp_path / "expected"))


def test_a_log_that_ends_in_a_remark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log_standard_4_25_pure.csv: the last line has 1 of 19 fields \('2 rows'\)"):
        prepare("kuairand", source(tmp_path / "src", [row(), "2 rows"]), tmp_path / "dst")
