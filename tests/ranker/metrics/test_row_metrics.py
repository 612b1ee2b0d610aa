"""The metrics of ``metrics=ranking`` and ``metrics=full`` against slow definitions and torchmetrics."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalAUROC, RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

import slow_metrics as slow
from ranker.data.batch import NO_GROUP, Batch
from ranker.data.schema import CategoricalFeature, DenseFeature, GroupColumn, Schema, Task
from ranker.errors import UserError
from ranker.metrics import (
    MAE,
    MRR,
    NDCG,
    XAUC,
    CalibrationBuckets,
    GroupAUC,
    Intervals,
    Recall,
    SegmentedNE,
    TaskMetrics,
    TaskRows,
)
from ranker.metrics.concordance import concordance
from ranker.metrics.pointwise import Standard, weighted_auc

CLICK = Task(name="click")
SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"),),
    categorical=(
        CategoricalFeature(name="tab", vocabulary=("home", "search")),
        CategoricalFeature(name="hour", num_embeddings=24),
    ),
    tasks=(CLICK, Task(name="watch", type="regression", transform="log1p", scale=1e-3)),
    weight="w",
    groups=(GroupColumn(name="user"), GroupColumn(name="session")),
)
EXTRA = (
    GroupAUC(),
    NDCG(k=[1, 3]),
    Recall(k=2, group="user"),
    MRR(group=["session"]),
    XAUC(),
    MAE(),
    CalibrationBuckets(buckets=4),
    SegmentedNE(feature=["tab", "hour"], max_segments=3),
)


def task_rows(rows, seed, *, weighted, ties=True):
    draw = np.random.default_rng(seed)
    z = draw.standard_normal(rows) * 2
    keys = draw.integers(-4, 5, rows) * 10**12
    keys[draw.random(rows) < 0.1] = NO_GROUP
    return TaskRows(
        task=CLICK,
        z_N=(z.round() if ties else z).astype(np.float32),
        y_N=(draw.random(rows) < 0.4).astype(np.float32),
        w_N=draw.random(rows) + 0.1 if weighted else np.ones(rows),
        keys={"user": keys},
    )


def batch(rows, seed=0):
    """Logits and a batch with weights, keys and features. Users have several sessions."""
    draw = torch.Generator().manual_seed(seed)
    session = torch.randint(0, max(rows // 4, 1), (rows,), generator=draw)
    keys = torch.stack([session // 3, session], 1)
    keys[torch.rand(rows, generator=draw) < 0.1] = NO_GROUP
    labels = torch.stack([(torch.rand(rows, generator=draw) < 0.4).float(), torch.rand(rows, generator=draw)], 1)
    found = Batch(
        dense_BF=torch.zeros(rows, 1),
        onehot_BC=torch.stack([torch.randint(0, n, (rows,), generator=draw) for n in (3, 25)], 1),
        ragged={},
        labels_BT=labels,
        mask_BT=torch.rand(rows, 2, generator=draw) < 0.8,
        time_ms_B=torch.arange(rows),
        row_B=torch.arange(rows),
        weight_B=torch.randint(1, 4, (rows,), generator=draw).float(),
        groups_BG=keys,
    )
    return torch.randn(rows, 2, generator=draw).mul(4).round() / 4, found


def measured(logits, rows, *, parts=None, extra=EXTRA, intervals=None, final=True, schema=SCHEMA):
    metrics = TaskMetrics(schema, extra=extra, intervals=intervals)
    for index in parts or [torch.arange(len(rows))]:
        metrics.add(logits[index], rows.take(index))
    values = metrics.compute(final=final)
    return values, metrics


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_metrics_in_groups_are_those_of_their_definitions(seed, weighted):
    rows = task_rows(1 + 4 * seed, seed, weighted=weighted)
    columns = (rows.z_N, rows.y_N, rows.w_N, rows.keys["user"])
    found = {**GroupAUC().statistics(rows), **MRR().statistics(rows)}
    expected = {"gauc.user": slow.gauc(*columns), "mrr.user": slow.over_groups(slow.mrr, *columns)}
    for k in (1, 2, 3, 10):
        found |= {**NDCG(k=k).statistics(rows), **Recall(k=k).statistics(rows)}
        expected[f"ndcg_{k}.user"] = slow.over_groups(slow.ndcg(k), *columns)
        expected[f"recall_{k}.user"] = slow.over_groups(slow.recall(k), *columns)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, nan_ok=True), name
    assert weighted_auc(*columns[:3]) == pytest.approx(slow.auc(*columns[:3]), nan_ok=True)


def test_without_ties_they_are_those_of_torchmetrics():
    rows = task_rows(300, 0, weighted=False, ties=False)
    known = rows.keys["user"] != NO_GROUP
    columns = (torch.from_numpy(column[known]) for column in (rows.z_N, rows.y_N.astype(np.int64)))
    _, index = np.unique(rows.keys["user"][known], return_inverse=True)
    inputs = {"indexes": torch.from_numpy(index), **dict(zip(("preds", "target"), columns, strict=True))}
    found = {**NDCG(k=5).statistics(rows), **Recall(k=5).statistics(rows), **MRR().statistics(rows)}
    for name, other in (
        ("ndcg_5", RetrievalNormalizedDCG(top_k=5)),
        ("recall_5", RetrievalRecall(top_k=5)),
        ("mrr", RetrievalMRR()),
    ):
        other.update(**inputs)
        assert found[f"{name}.user"].value == pytest.approx(float(other.compute()), abs=1e-6)
    sizes = np.bincount(index)
    by_group = RetrievalAUROC(aggregation=lambda values, dim: (values * torch.from_numpy(sizes)).sum() / sizes.sum())
    by_group.update(**inputs)
    assert GroupAUC().statistics(rows)["gauc.user"].value == pytest.approx(float(by_group.compute()), abs=1e-6)


def test_a_model_that_says_the_same_of_every_row_gets_what_chance_gives():
    rows = TaskRows(
        task=CLICK,
        z_N=np.zeros(4, dtype=np.float32),
        y_N=np.array([1, 0, 0, 1], dtype=np.float32),
        w_N=np.ones(4),
        keys={"user": np.zeros(4, dtype=np.int64)},
    )
    assert GroupAUC().statistics(rows)["gauc.user"].value == 0.5
    assert Recall(k=1).statistics(rows)["recall_1.user"].value == 0.25
    # The first positive is in place 1, 2, 3 with probability 1/2, 1/3, 1/6.
    assert MRR().statistics(rows)["mrr.user"].value == pytest.approx(1 / 2 + 1 / 6 + 1 / 18)


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 32, 33])
@pytest.mark.parametrize("weighted", [False, True])
def test_xauc_is_the_share_of_pairs_in_the_right_order(rows, weighted):
    draw = np.random.default_rng(rows)
    z, y = (draw.standard_normal(rows).round(digits).astype(np.float32) for digits in (0, 1))
    w = draw.random(rows) if weighted else np.ones(rows)
    assert concordance(z, y, w) == pytest.approx(slow.xauc(z, y, w), nan_ok=True)
    labels = (y > 0).astype(np.float32)
    assert concordance(z, labels, w) == pytest.approx(slow.auc(z, labels, w), nan_ok=True)


def test_a_row_of_weight_w_counts_like_w_rows():
    logits, rows = batch(80)
    copies = torch.arange(80).repeat_interleave(rows.weight_B.long())
    listed = {"ndcg", "recall", "mrr"}  # in a list, a row has one place whatever its weight
    weighted, _ = measured(logits, rows)
    again, _ = measured(logits, rows.take(torch.arange(80)))
    assert again == weighted
    one = rows.take(copies)
    object.__setattr__(one, "weight_B", torch.ones(len(copies)))
    repeated, _ = measured(logits[copies], one)
    for name, value in weighted.items():
        metric = name.split("/")[1]
        if metric.split("_")[0].split(".")[0] not in listed and metric not in ("observed", "ece"):
            assert value == pytest.approx(repeated[name], nan_ok=True), name


def test_weights_of_one_are_no_weights():
    logits, rows = batch(80)
    plain_schema = Schema.from_dict({**SCHEMA.to_dict(), "weight": ""})
    object.__setattr__(rows, "weight_B", torch.ones(80))
    assert measured(logits, rows)[0] == pytest.approx(measured(logits, rows, schema=plain_schema)[0], nan_ok=True)


def test_neither_batches_nor_the_order_of_rows_matter():
    logits, rows = batch(200)
    draws = Intervals(resamples=20)
    whole, metrics = measured(logits, rows, intervals=draws)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    again, others = measured(logits, rows, parts=order.split(33), intervals=draws)
    assert again == pytest.approx(whole, rel=1e-9, nan_ok=True)
    assert others.intervals.keys() == metrics.intervals.keys()
    for name, ends in metrics.intervals.items():
        assert others.intervals[name] == pytest.approx(ends, rel=1e-9), name
    for one, other in zip(metrics.tables, others.tables, strict=True):
        assert [row[0] for row in one.rows] == [row[0] for row in other.rows]
        assert one.rows[0][1:] == pytest.approx(other.rows[0][1:], nan_ok=True)


def test_names_are_known_before_any_row_and_hold_one_slash():
    logits, rows = batch(60)
    values, metrics = measured(logits, rows)
    extra = metrics.names()
    assert set(extra) == set(values) - set(TaskMetrics(SCHEMA).compute())
    assert "click/gauc.session" in extra
    assert "click/recall_2.user" in extra
    assert "click/recall_2.session" not in extra
    assert "watch/mae_raw" in extra
    assert all(name.count("/") == 1 for name in values)


def test_mae_in_the_units_of_the_column():
    logits, rows = batch(60)
    values, _ = measured(logits, rows, extra=[MAE()])
    seen, w = rows.mask_BT[:, 1], rows.weight_B
    z, y = logits[seen, 1].double(), rows.labels_BT[seen, 1].double()
    raw = (torch.sign(z) * torch.expm1(z.abs()) - torch.expm1(y)).abs() * 1e3
    assert values["watch/mae"] == pytest.approx(float((w[seen] * (z - y).abs()).sum() / w[seen].sum()))
    assert values["watch/mae_raw"] == pytest.approx(float((w[seen] * raw).sum() / w[seen].sum()))


def test_segments_and_buckets_add_up_to_the_whole():
    logits, rows = batch(400)
    values, metrics = measured(logits, rows)
    tables = {(table.task, table.name): table for table in metrics.tables}
    seen, w = rows.mask_BT[:, 0], rows.weight_B
    p, y = torch.sigmoid(logits[:, 0].double()), rows.labels_BT[:, 0]

    tab = tables["click", "ne.tab"]
    assert {row[0] for row in tab.rows} == {"unknown", "home", "search"}
    for row in tab.rows:
        inside = seen & (rows.onehot_BC[:, 0] == ["unknown", "home", "search"].index(row[0]))
        share = float((w[inside] * y[inside]).sum() / w[inside].sum())
        loss = float(-(w * (y * p.log() + (1 - y) * (1 - p).log()))[inside].sum() / w[inside].sum())
        entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
        assert row[1] == int(inside.sum())
        assert row[2:] == pytest.approx(
            [share, float((w * p)[inside].sum() / w[inside].sum()), row[3] / share, loss / entropy]
        )
    assert sum(row[1] for row in tables["click", "ne.hour"].rows) == int(seen.sum())
    assert tables["click", "ne.hour"].rows[-1][0] == "22 others"

    buckets = tables["click", "calibration"].rows
    assert sum(row[0] for row in buckets) == int(seen.sum())
    assert [row[1] for row in buckets] == sorted(row[1] for row in buckets)
    assert values["click/ece"] < 0.5
    assert tables["watch", "calibration"].columns == ("rows", "mean prediction", "mean label")


def test_ece_of_a_calibrated_model_is_near_0_and_of_one_that_is_off_by_a_tenth_near_it():
    draw = np.random.default_rng(0)
    p = draw.uniform(0.2, 0.8, 200_000)
    for shift in (0.0, 0.1):
        rows = TaskRows(
            task=CLICK,
            z_N=np.log(p / (1 - p)).astype(np.float32),
            y_N=(draw.random(len(p)) < p + shift).astype(np.float32),
            w_N=np.ones(len(p)),
        )
        assert CalibrationBuckets().statistics(rows)["ece"].value == pytest.approx(shift, abs=0.006)


def test_intervals_are_those_of_a_bootstrap_over_whole_groups():
    logits, rows = batch(120)
    _, metrics = measured(logits, rows, extra=[GroupAUC()], intervals=Intervals(resamples=40, by="user", seed=3))
    seen = rows.mask_BT[:, 0].numpy()
    z, y, w = (column.numpy()[seen] for column in (logits[:, 0], rows.labels_BT[:, 0], rows.weight_B.double()))
    keys = rows.groups_BG[:, 0].numpy()[seen]
    alone = np.flatnonzero(keys == NO_GROUP)
    clusters = slow.groups_of(keys) + [alone[[i]] for i in np.lexsort((w[alone], y[alone], z[alone]))]
    random = np.random.RandomState(3)
    auc, gauc, logloss = [], [], []
    for _ in range(40):
        drawn = [clusters[i] for i in random.randint(0, len(clusters), len(clusters))]
        index = np.concatenate(drawn)
        # A user who was drawn twice is two users.
        names = np.repeat(np.arange(len(drawn)), [len(part) for part in drawn])
        auc.append(slow.auc(z[index], y[index], w[index]))
        gauc.append(slow.gauc(z[index], y[index], w[index], np.where(keys[index] == NO_GROUP, NO_GROUP, names)))
        loss = np.logaddexp(0, z[index].astype(float)) - y[index] * z[index]
        logloss.append(np.average(loss, weights=w[index]))
    for name, values in (("auc", auc), ("gauc.user", gauc), ("logloss", logloss)):
        assert metrics.intervals[f"click/{name}"] == pytest.approx(np.quantile(values, [0.025, 0.975])), name
    assert "click/gauc.session" in metrics.intervals  # a session belongs to one user


def test_groups_that_cross_the_bootstraps_groups_have_no_interval():
    logits, rows = batch(120)
    _, metrics = measured(logits, rows, extra=[GroupAUC()], intervals=Intervals(resamples=20, by="session"))
    assert "click/gauc.session" in metrics.intervals
    assert "click/gauc.user" not in metrics.intervals


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """Users have rates of their own: intervals over single rows would be too narrow."""
    draw = np.random.default_rng(0)
    inside = {"user": 0, None: 0}
    for _ in range(60):
        keys = np.repeat(np.arange(80), 20)
        rate = np.repeat(draw.beta(1, 1, 80), 20)
        y = (draw.random(len(keys)) < rate).astype(np.float32)
        rows = TaskRows(
            task=CLICK, z_N=np.zeros(len(keys), dtype=np.float32), y_N=y, w_N=np.ones(len(keys)), keys={"user": keys}
        )
        calibration = {"calibration": Standard().statistics(rows)["calibration"]}
        for by in inside:
            low, high = Intervals(resamples=100, level=0.9).of(calibration, rows, by=by)["calibration"]
            inside[by] += low <= 1.0 <= high  # the mean rate is 1/2, as is the prediction
    assert inside["user"] >= 47
    assert inside[None] <= 40


def test_the_standard_metrics_from_rows_are_those_of_the_sums():
    logits, rows = batch(300)
    _, metrics = measured(logits, rows, extra=[])
    values = metrics.compute()
    wanted = TaskMetrics(SCHEMA, intervals=Intervals(resamples=20))
    wanted.add(logits, rows)
    assert wanted.compute(final=True) == pytest.approx(values)
    for name, (low, high) in wanted.intervals.items():
        assert low <= values[name] <= high


def test_undefined_metrics_say_why():
    logits, rows = batch(30)
    rows.labels_BT[:, 0] = 0.0
    rows.labels_BT[:, 1] = 1.0
    values, metrics = measured(logits, rows)
    for name, why in (
        ("click/gauc.user", "no group has both labels"),
        ("click/ndcg_3.session", "no group has a positive label"),
        ("click/ne.tab", "no value of tab has both labels"),
        ("watch/xauc", "all observed labels are the same"),
    ):
        assert math.isnan(values[name])
        assert metrics.notes[name] == why


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_a_broken_model_has_no_metric_of_its_task(junk):
    logits, rows = batch(30)
    logits[rows.mask_BT[:, 0].nonzero()[0, 0], 0] = junk
    values, metrics = measured(logits, rows, intervals=Intervals(resamples=20))
    assert math.isnan(values["click/gauc.user"])
    assert metrics.notes["click/mrr.session"] == "predictions are not finite"
    assert values["watch/xauc"] > 0
    assert not any(name.startswith("click") for name in metrics.intervals)


def test_no_rows_at_all_give_nan_without_a_crash():
    values = TaskMetrics(SCHEMA, extra=EXTRA, intervals=Intervals(resamples=20)).compute(final=True)
    assert math.isnan(values["click/gauc.user"])
    assert math.isnan(values["watch/xauc"])


def test_rows_without_what_a_metric_needs_are_refused():
    logits, rows = batch(10)
    with pytest.raises(UserError, match="metrics need rows with a weight"):
        TaskMetrics(SCHEMA).update(logits, rows.labels_BT, rows.mask_BT)


def test_updates_do_not_wait_for_the_device():
    # Tensors on the meta device hold no values: reading one raises.
    logits, rows = batch(10)
    TaskMetrics(SCHEMA, extra=EXTRA).to("meta").add(logits.to("meta"), rows.to("meta"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NDCG(k=0), "k of ndcg must be a whole number of at least 1, got 0"),
        (lambda: Recall(k=[5, 2.5]), "k of recall"),
        (lambda: CalibrationBuckets(buckets=1), "buckets must be at least 2"),
        (lambda: SegmentedNE(feature="tab", max_segments=0), "max_segments"),
        (lambda: Intervals(resamples=5), "resamples must be 0"),
        (lambda: Intervals(resamples=100, level=1.0), "level must be between 0 and 1"),
        (lambda: TaskMetrics(SCHEMA, extra=[GroupAUC(group="usr")]), "no group 'usr'; did you mean 'user'"),
        (lambda: TaskMetrics(SCHEMA, extra=[SegmentedNE(feature="x")]), "'x' is no one-hot feature"),
        (lambda: TaskMetrics(SCHEMA, intervals=Intervals(resamples=20, by="usr")), "metrics.intervals.by: no group"),
    ],
)
def test_options_that_make_no_metric_are_one_line(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.slow
def test_a_million_rows_in_a_hundred_thousand_groups_take_seconds():
    draw = np.random.default_rng(0)
    rows = TaskRows(
        task=CLICK,
        z_N=draw.standard_normal(10**6).astype(np.float32),
        y_N=(draw.random(10**6) < 0.1).astype(np.float32),
        w_N=np.ones(10**6),
        keys={"user": draw.integers(0, 10**5, 10**6)},
    )
    start = time.process_time()
    for metric in (GroupAUC(), NDCG(k=[5, 10]), Recall(k=[5, 10]), MRR(), CalibrationBuckets()):
        for statistic in metric.statistics(rows).values():
            assert 0.0 <= statistic.value <= 1.0
    assert concordance(rows.z_N, rows.z_N + rows.y_N, rows.w_N) > 0.5
    assert time.process_time() - start < 10  # about 3 on a laptop's core
