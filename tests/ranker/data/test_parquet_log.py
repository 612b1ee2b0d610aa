from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranker.data.loader import WindowedLoader
from ranker.data.log import Log
from ranker.data.parquet_index import ParquetIndex
from ranker.data.parquet_log import ParquetLog
from ranker.data.windows import plan_windows
from ranker.errors import UserError
from support import ROOT

SRC = ROOT / "src"
DAY_MS = 86_400_000
START_MS = 1_650_844_800_000
UNEVEN = {0: 13, 1: 0, 2: 41, 3: 1, 5: 20, 6: 9}
ROWS = sum(UNEVEN.values())


def test_every_column_is_read_at_every_position(write_log):
    log = ParquetLog(str(write_log(UNEVEN)))
    assert isinstance(log, Log)
    assert (log.num_rows, log.train_rows) == (ROWS, ROWS - 9)
    for start, stop in [(0, ROWS), (0, 1), (12, 14), (53, 56), (80, ROWS)]:
        batch = log.read(start, stop)
        row = torch.arange(start, stop)
        assert torch.equal(batch.row_B, row)
        assert torch.equal(batch.dense_BF, row[:, None] / 8)
        assert torch.equal(batch.onehot_BC[:, 1], torch.tensor([(2, 1, 0)[i % 3] for i in range(start, stop)]))
        assert torch.equal(batch.onehot_BC[:, 2], row % 7 + 1)
        assert torch.equal(torch.diff(batch.ragged["tags"].offsets), row % 4)
        assert batch.ragged["tags"].values.tolist() == [v + 1 for i in range(start, stop) for v in range(i % 4)]
        assert torch.equal(batch.labels_BT[:, 0], (row % 2).float())
        assert torch.allclose(batch.labels_BT[:, 1], torch.log1p(torch.where(row % 5 == 0, 0, row)))
        assert batch.mask_BT.all()


def test_times_and_positions_are_found_from_each_other(write_log):
    log = ParquetLog(str(write_log(UNEVEN)))
    times = log.read(0, ROWS).time_ms_B.tolist()
    assert [log.time_at_row(row) for row in range(ROWS)] == times
    for time_ms in sorted({t + d for t in times for d in (-1, 0, 1)}):
        assert log.row_at_time(time_ms) == int(np.searchsorted(times, time_ms))
    assert log.row_at_time(times[-1] + 1) == ROWS


def test_equal_times_across_row_groups_and_files_are_found_at_their_first_row(write_log):
    def all_at_once(day, columns):
        columns["t"] = pa.array([START_MS + DAY_MS] * len(columns["t"]))

    log = ParquetLog(str(write_log({0: 25, 1: 25, 2: 0}, change=lambda d, c: all_at_once(d, c) if d == 1 else None)))
    assert log.row_at_time(START_MS + DAY_MS) == 25
    assert log.train_rows == 25


@pytest.mark.parametrize("manifest", [False, True])
def test_a_manifest_changes_nothing(write_log, manifest):
    assert ParquetLog(str(write_log(UNEVEN, manifest=manifest))).num_rows == ROWS


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Shanghai"])
def test_times_may_be_timestamps_of_any_unit(write_log, unit, zone):
    def change(day, columns):
        columns["t"] = columns["t"].cast(pa.timestamp("ms", tz=zone)).cast(pa.timestamp(unit, tz=zone), safe=False)

    log = ParquetLog(str(write_log(UNEVEN, change=change)))
    assert (log.num_rows, log.train_rows) == (ROWS, ROWS - 9)
    assert log.time_at_row(13) == START_MS + 2 * DAY_MS
    assert log.row_at_time(START_MS + 2 * DAY_MS) == 13


def test_times_are_found_in_files_without_statistics(write_log):
    root = write_log(UNEVEN)
    for path in root.glob("*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=10, write_statistics=False)
    log = ParquetLog(str(root))
    assert (log.num_rows, log.train_rows) == (ROWS, ROWS - 9)
    assert log.row_at_time(START_MS + 2 * DAY_MS) == 13


def test_the_last_days_are_held_out(write_log):
    root = str(write_log(UNEVEN))
    assert [ParquetLog(root, eval_days=days).train_rows for days in (1, 2, 3, 4)] == [75, 55, 55, 54]
    with pytest.raises(UserError, match="leave none to train on if the last 9 days are held out"):
        ParquetLog(root, eval_days=9)
    with pytest.raises(UserError, match="eval_days must be a whole number of at least 1"):
        ParquetLog(root, eval_days=0)


def test_a_range_of_days_is_cut_out_and_counted_from_its_first_row(write_log):
    root = str(write_log(UNEVEN))
    log = ParquetLog(root, days=["2022-04-26", "2022-04-28"])
    assert (log.num_rows, log.train_rows) == (42, 41)
    assert torch.equal(log.read(0, 42).row_B, torch.arange(13, 55))
    assert log.row_at_time(0) == 0
    assert log.row_at_time(START_MS + 3 * DAY_MS) == 41
    assert log.row_at_time(START_MS + 9 * DAY_MS) == 42
    assert ParquetLog(root, days=[None, "2022-04-27"]).num_rows == 54
    assert ParquetLog(root, days=["2022-04-27", None]).num_rows == ROWS - 13


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (["2023-01-01", "2023-01-09"], "hold no rows; the log covers 2022-04-25 .. 2022-05-01"),
        (["2022-04-26", "2022-04-26"], "hold no rows"),
        (["2022-04-28", "2022-04-27"], "hold no rows"),
        (["yesterday", None], "'yesterday' is not a day; write YYYY-MM-DD"),
        ("2022-04-26", r"days must be \[first, last\]"),
    ],
)
def test_a_range_without_rows_is_refused(write_log, days, message):
    with pytest.raises(UserError, match=message):
        ParquetLog(str(write_log(UNEVEN)), days=days)


@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
@pytest.mark.parametrize("window", [4, 20, 1000, "6h"])
def test_the_loader_gives_every_row_once_over_uneven_files(write_log, row_group_size, window):
    log = ParquetLog(str(write_log(UNEVEN, row_group_size=row_group_size)))
    plan = plan_windows(log, window=window, batch_size=4)
    for workers, world_size in [(0, 1), (1, 1), (3, 1), (1, 2), (1, 3), (3, 4)]:
        rows = []
        for rank in range(world_size):
            loader = WindowedLoader(log, plan=plan, seed=1, num_workers=workers, rank=rank, world_size=world_size)
            batches = [batch.row_B.tolist() for batch in loader]
            assert len(batches) == plan.num_batches, "a rank with fewer would leave the others waiting"
            rows += [row for batch in batches for row in batch]
        assert sorted(rows) == list(range(log.train_rows))


def test_going_on_late_reads_the_row_groups_of_its_window_alone(write_log, monkeypatch):
    log = ParquetLog(str(write_log(dict.fromkeys(range(30), 20), row_group_size=10)))
    read = []
    original = ParquetIndex.read
    monkeypatch.setattr(
        ParquetIndex, "read", lambda self, group, names: read.append(group) or original(self, group, names)
    )
    plan = plan_windows(log, window=20, batch_size=4)
    loader = WindowedLoader(log, plan=plan, seed=1, num_workers=0, start_batch=102)
    assert next(iter(loader)).number == 102
    assert read == [40, 41]  # of 60: only those of window 20


def test_a_row_group_is_decoded_once_however_many_windows_it_spans(write_log, monkeypatch):
    log = ParquetLog(str(write_log({0: 50, 1: 10}, row_group_size=50)))
    decoded = []
    original = log._decode
    monkeypatch.setattr(log, "_decode", lambda group: decoded.append(group) or original(group))
    plan = plan_windows(log, window=4, batch_size=4)
    list(WindowedLoader(log, plan=plan, seed=1, num_workers=3))
    assert decoded == [0]


def test_many_threads_may_read_at_once(write_log):
    log = ParquetLog(str(write_log(UNEVEN, row_group_size=3)))
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda start: log.read(start, start + 9), range(ROWS - 9)))
    assert all(batch.row_B.tolist() == list(range(i, i + 9)) for i, batch in enumerate(batches))


def test_a_log_can_be_sent_to_another_process(write_log):
    log = ParquetLog(str(write_log(UNEVEN)), days=["2022-04-26", None])
    log.read(0, 3)
    copy = pickle.loads(pickle.dumps(log))
    assert torch.equal(copy.read(0, 30).onehot_BC, log.read(0, 30).onehot_BC)


def test_positions_are_row_ids_where_the_schema_names_none(write_log, log_schema):
    schema = dataclasses.replace(log_schema, row_id="")
    log = ParquetLog(str(write_log(UNEVEN)), schema=schema, days=["2022-04-27", None])
    assert torch.equal(log.read(5, 60).row_B, torch.arange(5, 60))


@pytest.mark.parametrize(("chosen", "backend"), [(None, "system"), ("mimalloc", "mimalloc")])
def test_row_groups_are_read_into_memory_that_goes_back_unless_the_environment_says_otherwise(
    write_log, chosen, backend
):
    environment = {k: v for k, v in os.environ.items() if k != "ARROW_DEFAULT_MEMORY_POOL"}
    environment |= {"ARROW_DEFAULT_MEMORY_POOL": chosen} if chosen else {}
    code = (
        "import sys; from ranker.data.parquet_log import ParquetLog; import pyarrow as pa; "
        "log = ParquetLog(sys.argv[1]); log.read(0, log.num_rows); pool = pa.default_memory_pool(); "
        "print(pool.backend_name, pool.max_memory() > 0)"
    )
    command = [sys.executable, "-c", code, str(write_log(UNEVEN))]
    done = subprocess.run(command, env=environment, cwd=SRC, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [backend, "True"]
