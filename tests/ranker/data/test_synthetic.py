from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from ranker.data.batch import Batch
from ranker.data.log import Log
from ranker.data.synthetic import BLOCK, DAY_MS, START_MS, SyntheticLog
from ranker.data.synthetic_world import Difficulty, World, zipf_rank
from ranker.errors import UserError


def small(**changes: object) -> SyntheticLog:
    sizes: dict[str, object] = {
        "num_users": 500,
        "num_items": 200,
        "train_rows": 25_000,
        "eval_rows": 3_000,
        "rows_per_day": 10_000,
    }
    return SyntheticLog(**(sizes | changes))  # type: ignore[arg-type]


def flat(batch: Batch) -> list[torch.Tensor]:
    lists = [t for r in batch.ragged.values() for t in (r.values, r.offsets)]
    columns = [batch.dense_BF, batch.onehot_BC, batch.labels_BT, batch.mask_BT, batch.time_ms_B, batch.row_B]
    return [*columns, *lists]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def auc(score: np.ndarray, label: np.ndarray) -> float:
    rank = np.empty(len(score))
    rank[np.argsort(score)] = np.arange(1, len(score) + 1)
    positives = label.sum()
    return float((rank[label > 0].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives)))


def test_it_is_a_log_whose_rows_fit_its_schema() -> None:
    log = small()
    assert isinstance(log, Log)
    batch = log.read(0, log.num_rows)
    schema = log.schema
    assert len(batch) == log.num_rows == 28_000
    assert batch.dense_BF.shape == (28_000, len(schema.dense))
    assert batch.dense_BF.isfinite().all()
    for c, feature in enumerate(schema.one_hot):
        ids = batch.onehot_BC[:, c]
        assert ids.min() >= 1, feature.name
        assert ids.max() < schema.table_of(feature).rows, feature.name
    for feature in schema.ragged:
        lists = batch.ragged[feature.name]
        assert lists.values.min() >= 1
        assert lists.values.max() < schema.table_of(feature).rows
        assert lists.offsets[0] == 0
        assert lists.offsets[-1] == len(lists.values)
        lengths = lists.offsets.diff()
        assert (lengths == 0).any()
        assert lengths.max() > 1


def test_any_range_reads_the_same_rows_as_the_whole_whatever_was_read_before() -> None:
    whole = small().read(0, 25_000)
    log = small()
    for start, stop in [(20_000, 20_001), (0, 10), (BLOCK - 3, 2 * BLOCK + 5), (8_000, 8_400), (0, 25_000)]:
        assert same(log.read(start, stop), whole.slice(start, stop))


def test_the_seed_decides_every_row() -> None:
    first = small(seed=3).read(100, 300)
    assert same(first, small(seed=3).read(100, 300))
    other = small(seed=4).read(100, 300)
    assert not torch.equal(first.labels_BT, other.labels_BT)
    assert not torch.equal(first.onehot_BC, other.onehot_BC)


def test_a_row_does_not_depend_on_how_long_the_log_is() -> None:
    assert same(small(train_rows=25_000).read(0, 10_000), small(train_rows=2_000_000).read(0, 10_000))


def test_time_ascends_and_the_hold_out_is_the_whole_next_day() -> None:
    log = small()
    batch = log.read(0, log.num_rows)
    assert (batch.time_ms_B.diff() >= 0).all()
    assert batch.time_ms_B[0] == START_MS
    assert batch.row_B.tolist() == list(range(log.num_rows))
    held_out = batch.time_ms_B[log.train_rows :]
    # 25,000 rows fill two and a half days: the third is cut short, the hold-out is the fourth.
    assert batch.time_ms_B[log.train_rows - 1] < START_MS + 5 * DAY_MS // 2
    assert held_out[0] == START_MS + 3 * DAY_MS
    assert held_out[-1] < START_MS + 4 * DAY_MS


def test_a_row_is_found_by_its_time() -> None:
    log = small(rows_per_day=7_001, eval_rows=2_999)
    for row in [0, 1, 6_999, 7_000, 7_001, 24_999, 25_000, 25_001, 27_998]:
        assert log.row_at_time(log.time_at_row(row)) == row
        assert log.row_at_time(log.time_at_row(row) - 1) == row
        assert log.row_at_time(log.time_at_row(row) + 1) == row + 1
    assert log.row_at_time(0) == 0
    assert log.row_at_time(START_MS + 100 * DAY_MS) == log.num_rows


def test_tasks_run_from_common_to_rare_and_watch_time_has_a_heavy_tail() -> None:
    log = small(num_users=5_000, num_items=2_000, train_rows=200_000)
    batch = log.read(0, 200_000)
    rates = batch.labels_BT[:, :4].mean(0).tolist()
    for rate, wanted in zip(rates, (0.4, 0.12, 0.04, 0.012), strict=True):
        assert wanted / 1.5 < rate < wanted * 1.5
    assert log.schema.tasks[5].transform == "log1p"
    seconds = torch.expm1(batch.labels_BT[:, 5])
    assert 0.05 < (seconds == 0).float().mean() < 0.15
    assert seconds.quantile(0.99) > 20 * seconds.median()


def test_only_the_rating_is_observed_in_part() -> None:
    batch = small().read(0, 10_000)
    observed = batch.mask_BT.float().mean(0)
    assert observed[[0, 1, 2, 3, 5]].tolist() == [1, 1, 1, 1, 1]
    assert 0.45 < observed[4] < 0.55
    assert (batch.labels_BT[:, 4][~batch.mask_BT[:, 4]] == 0).all()


def test_popularity_follows_zipf() -> None:
    rank = zipf_rank(np.random.default_rng(0).random(100_000), 1_000, 1.0)
    counts = np.bincount(rank, minlength=1_000)
    assert rank.min() == 0
    assert rank.max() == 999
    # (1 + rank)^-1: the first rank is about ten times as frequent as the tenth.
    assert 7 < counts[0] / counts[9] < 16
    flatter = np.bincount(zipf_rank(np.random.default_rng(0).random(100_000), 1_000, 0.5), minlength=1_000)
    assert flatter[0] < counts[0] / 3


def test_new_items_arrive_and_old_ones_go() -> None:
    log = small(difficulty=Difficulty(arrivals=0.2), train_rows=100_000)
    item = [f.name for f in log.schema.one_hot].index("item_id")
    days = [set(log.read(d * 10_000, (d + 1) * 10_000).onehot_BC[:, item].tolist()) for d in (0, 5)]
    fresh = len(days[1] - days[0]) / len(days[1])
    assert fresh > 0.5
    still = small(difficulty=Difficulty(arrivals=0.0), train_rows=100_000)
    days = [set(still.read(d * 10_000, (d + 1) * 10_000).onehot_BC[:, item].tolist()) for d in (0, 5)]
    assert len(days[1] - days[0]) < 20


def test_the_scale_of_a_signal_jumps_only_where_it_is_told_to() -> None:
    def scales(**knobs: float) -> torch.Tensor:
        log = small(difficulty=Difficulty(tail=0, drift=0, **knobs), train_rows=100_000)
        # A signal without tail and drift, by quarter days.
        raw = [i for i, f in enumerate(log.schema.dense) if f.name.startswith("signal") and f.transform == "none"]
        return log.read(0, 100_000).dense_BF[:, raw].view(40, 2_500, -1).std(1)

    steady, jumping = scales(jump=0), scales(jump=10, jump_share=0.1)
    typical = steady.median(0).values
    assert (steady / typical).max() < 1.5
    far = (jumping / typical > 5) | (jumping / typical < 0.2)
    assert 0.03 < far.float().mean() < 0.2
    later = scales(jump=10, jump_share=0.1, quiet_days=5)
    assert torch.equal(later[20:], jumping[20:])
    assert torch.equal(later[:20], steady[:20]), "no jump in the first five days"


def test_what_a_match_is_worth_drifts_and_stands_still_without_drift() -> None:
    def agreement(drift: float) -> float:
        """Correlation of the click score of the same users and items, now and six days later."""
        knobs = Difficulty(drift=drift)
        world = World(seed=0, num_users=2_000, num_items=2_000, signals=4, difficulty=knobs)
        pairs = np.arange(2_000)
        days = [np.full(2_000, day) for day in (0.0, 6.0)]
        scores = [world._scores(*world._latents(pairs, pairs, day), day)[:, 0] for day in days]
        return float(np.corrcoef(*scores)[0, 1])

    assert agreement(0.0) == pytest.approx(1.0, abs=1e-5)
    assert agreement(1.0) < 0.8


def test_the_signals_shift_with_time() -> None:
    def spread(drift: float) -> float:
        """How far the mean of a signal moves over eight days, the largest over signals."""
        log = small(difficulty=Difficulty(tail=0, jump=0, drift=drift), train_rows=80_000)
        raw = [i for i, f in enumerate(log.schema.dense) if f.name.startswith("signal") and f.transform == "none"]
        means = log.read(0, 80_000).dense_BF[:, raw].view(8, 10_000, -1).mean(1)
        return float((means.max(0).values - means.min(0).values).max())

    assert spread(0.0) < 0.3
    assert spread(1.0) > 1.0


def test_blocks_are_different_draws() -> None:
    batch = small().read(0, 2 * BLOCK)
    assert not torch.equal(batch.labels_BT[:BLOCK], batch.labels_BT[BLOCK:])
    assert not torch.equal(batch.onehot_BC[:BLOCK, 0], batch.onehot_BC[BLOCK:, 0])


def test_the_common_task_can_be_learned_from_the_features() -> None:
    log = small(difficulty=Difficulty(), train_rows=60_000, num_users=5_000, num_items=2_000)
    parts = [log.read(0, 60_000), log.read(60_000, 63_000)]
    x = [np.sign(d := b.dense_BF.numpy()) * np.log1p(np.abs(d)) for b in parts]
    x = [np.concatenate([d, np.ones((len(d), 1))], 1) for d in x]
    weights = np.linalg.lstsq(x[0], parts[0].labels_BT[:, 0].numpy(), rcond=None)[0]
    assert auc(x[1] @ weights, parts[1].labels_BT[:, 0].numpy()) > 0.62


def test_a_selection_of_tasks_and_features_leaves_the_rows_as_they_are() -> None:
    log = small()
    chosen = log.schema.select(tasks=["click", "watch_time"], drop_features=["item_id", "signal_01", "tags"])
    narrow = small(schema=chosen).read(9_000, 9_500)
    whole = log.read(9_000, 9_500)
    assert torch.equal(narrow.labels_BT, whole.labels_BT[:, [0, 5]])
    assert narrow.dense_BF.shape[1] == whole.dense_BF.shape[1] - 1
    assert torch.equal(narrow.ragged["history"].values, whole.ragged["history"].values)
    assert "tags" not in narrow.ragged
    log.schema = chosen
    assert same(log.read(9_000, 9_500), narrow)


def test_it_can_be_sent_to_a_worker_process() -> None:
    log = small()
    before = log.read(0, 100)
    assert same(pickle.loads(pickle.dumps(log)).read(0, 100), before)


def test_a_range_outside_the_log_is_refused() -> None:
    log = small()
    for start, stop in [(-1, 5), (5, 5), (0, log.num_rows + 1)]:
        with pytest.raises(UserError, match="are not within"):
            log.read(start, stop)


@pytest.mark.parametrize("name", ["num_users", "num_items", "train_rows", "eval_rows", "rows_per_day"])
def test_a_size_of_zero_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least"):
        small(**{name: 0})


def test_knobs_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="jump_share"):
        Difficulty(jump_share=1.5)
    with pytest.raises(UserError, match="drift_days"):
        Difficulty(drift_days=0)


ROWS_OF_A_STREAM = """
import hashlib
from ranker.data.synthetic import SyntheticLog

rows = SyntheticLog(train_rows=20_000, eval_rows=1_000).read(0, 20_000)
parts = (rows.dense_BF, rows.onehot_BC, rows.labels_BT, rows.ragged["tags"].values)
print(*(hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in parts))
"""


def test_rows_do_not_depend_on_the_number_of_threads():
    """The libraries read it when they are loaded, so each number needs a process."""
    seen = set()
    for threads in ("1", "5"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", ROWS_OF_A_STREAM]
        seen.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(seen) == 1


@pytest.mark.parametrize("first_day", [1, 2])
def test_a_log_that_begins_on_a_later_day_is_the_stream_from_there_on(first_day: int) -> None:
    whole = small(train_rows=30_000, eval_rows=10_000)
    later = small(train_rows=30_000 - first_day * 10_000, eval_rows=10_000, first_day=first_day)
    at = first_day * 10_000
    there, here = whole.read(at, 40_000), later.read(0, later.num_rows)
    assert same(dataclasses.replace(there, row_B=there.row_B - at), here)
    for row in (0, 1, 9_999, 10_000, later.num_rows - 1):
        assert later.time_at_row(row) == whole.time_at_row(at + row)
        assert later.row_at_time(later.time_at_row(row)) == row
    assert later.row_at_time(START_MS) == 0
    with pytest.raises(UserError, match="first_day must be at least 0"):
        small(first_day=-1)
