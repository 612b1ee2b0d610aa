from __future__ import annotations

import math

import pytest
import torch

from ranker.data.schema import DenseFeature, Schema, Task
from ranker.metrics import TaskMetrics

NAN, INF = math.nan, math.inf
SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"),),
    tasks=(Task(name="click"), Task(name="watch", type="regression", transform="log1p"), Task(name="like")),
)


def logit(p):
    return math.log(p / (1 - p))


def one_task(logits, labels, mask=None, *, task=0):
    """Inputs in which only one task's column has observed labels."""
    rows = len(logits)
    z, y, m = torch.zeros(rows, 3), torch.zeros(rows, 3), torch.zeros(rows, 3, dtype=torch.bool)
    z[:, task], y[:, task] = torch.tensor(logits), torch.tensor(labels)
    m[:, task] = True if mask is None else torch.tensor(mask)
    return z, y, m


def computed(*inputs):
    metrics = TaskMetrics(SCHEMA)
    metrics.update(*inputs)
    return metrics.compute(), metrics.notes


def auc_by_pairs(scores, labels):
    positive, negative = scores[labels == 1], scores[labels == 0]
    difference = positive[:, None].double() - negative[None]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


def some_rows(rows=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, generator=draw).mul(4).round() / 4  # rounded, so that there are ties
    labels = (torch.rand(rows, 3, generator=draw) < 0.4).float()
    return logits, labels, torch.rand(rows, 3, generator=draw) < 0.7


def test_binary_metrics_by_hand():
    values, notes = computed(*one_task([logit(0.8), logit(0.4), logit(0.6), logit(0.2)], [1.0, 0.0, 0.0, 1.0]))
    # Pairs (0.8, 0.4), (0.8, 0.6) are right, (0.2, 0.4), (0.2, 0.6) wrong.
    logloss = -(math.log(0.8) + math.log(0.6) + math.log(0.4) + math.log(0.2)) / 4
    expected = {"auc": 0.5, "logloss": logloss, "ne": logloss / math.log(2), "calibration": 1.0, "observed": 4}
    for name, value in expected.items():
        assert values[f"click/{name}"] == pytest.approx(value)
    assert not any(key.startswith("click/") for key in notes)


def test_regression_metrics_by_hand():
    values, _ = computed(*one_task([1.0, 3.0], [2.0, 0.0], task=1))
    assert values["watch/rmse"] == pytest.approx(math.sqrt((1 + 9) / 2))
    assert values["watch/calibration"] == pytest.approx(4 / 2)
    assert values["watch/r2"] == pytest.approx(1 - 5 / 1)  # the variance of the labels is 1


def test_r2_of_the_mean_is_0_and_of_equal_labels_undefined_with_a_reason():
    values, _ = computed(*one_task([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], task=1))
    assert values["watch/r2"] == pytest.approx(0.0)
    values, notes = computed(*one_task([2.0, 2.5], [3.0, 3.0], task=1))
    assert math.isnan(values["watch/r2"])
    assert notes["watch/r2"] == "all 2 observed labels are the same"


def test_always_saying_the_base_rate_has_normalised_entropy_one_and_calibration_one():
    values, _ = computed(*one_task([logit(0.2)] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]))
    assert values["click/ne"] == pytest.approx(1.0)
    assert values["click/calibration"] == pytest.approx(1.0)
    assert values["click/auc"] == 0.5


def test_rows_that_are_not_observed_do_not_count():
    inputs = one_task([1.0, 2.0, NAN, 5.0], [0.0, 1.0, 1.0, NAN], [True, True, False, False])
    values, _ = computed(*inputs)
    fewer, _ = computed(*one_task([1.0, 2.0], [0.0, 1.0]))
    assert {k: v for k, v in values.items() if k.startswith("click")} == {
        k: v for k, v in fewer.items() if k.startswith("click")
    }
    assert values["click/nonfinite"] == 0


def test_auc_counts_pairs_with_ties_as_half():
    logits, labels, mask = some_rows()
    values, _ = computed(logits, labels, mask)
    for at, name in ((0, "click"), (2, "like")):
        seen = mask[:, at]
        assert values[f"{name}/auc"] == pytest.approx(auc_by_pairs(logits[seen, at], labels[seen, at]), abs=1e-6)


def test_rows_in_many_batches_give_what_they_give_at_once():
    rows = some_rows()
    metrics = TaskMetrics(SCHEMA)
    for start, stop in ((0, 17), (17, 17), (17, 40), (40, 60)):  # one of them empty
        metrics.update(*(part[start:stop] for part in rows))
    assert metrics.compute() == pytest.approx(computed(*rows)[0])


@pytest.mark.parametrize(("label", "said"), [(0.0, "labels are 0"), (1.0, "labels are 1")])
def test_auc_of_one_class_is_nan_and_says_why(label, said):
    values, notes = computed(*one_task([1.0, 2.0], [label, label]))
    assert math.isnan(values["click/auc"])
    assert math.isnan(values["click/ne"])
    assert said in notes["click/auc"]
    assert values["click/logloss"] > 0
    assert math.isnan(values["click/calibration"]) == (label == 0.0)


def test_a_task_without_rows_is_nan_and_says_why():
    values, notes = computed(*one_task([1.0], [1.0]))
    assert values["like/observed"] == 0
    for name in ("like/auc", "like/logloss", "watch/rmse"):
        assert math.isnan(values[name])
        assert notes[name] == "no row has an observed label"


def test_no_update_at_all_gives_nan_without_a_crash():
    values = TaskMetrics(SCHEMA).compute()
    assert values["click/observed"] == 0
    assert math.isnan(values["click/auc"])


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_predictions_that_are_not_finite_are_counted_and_make_the_task_nan(junk):
    logits, labels, mask = some_rows()
    mask[:3, 0] = True
    logits[:3, 0] = junk
    values, notes = computed(logits, labels, mask)
    assert values["click/nonfinite"] == 3
    assert all(math.isnan(values[f"click/{name}"]) for name in ("auc", "logloss", "ne", "calibration"))
    assert "3 of" in notes["click/auc"]
    assert not math.isnan(values["like/auc"])


def test_large_logits_are_not_ties():
    values, _ = computed(*one_task([30.0, 29.0, 28.0, 27.0], [1.0, 0.0, 1.0, 0.0]))
    assert values["click/auc"] == pytest.approx(0.75)


def test_a_prediction_beyond_float_range_leaves_the_other_tasks_alone():
    logits, labels, mask = some_rows()
    logits[:, 1] = 3e38
    values, _ = computed(logits, labels, mask)
    assert values["watch/rmse"] == pytest.approx(3e38)
    assert values["click/auc"] == computed(*some_rows())[0]["click/auc"]


@pytest.mark.parametrize("name", ["click", "watch"])
@pytest.mark.parametrize("rows", [1, 60])
def test_a_schema_of_one_task_gives_the_same_numbers(name, rows):
    at = SCHEMA.task_names.index(name)
    inputs = [part[:rows] for part in some_rows()]
    one = TaskMetrics(SCHEMA.select(tasks=[name]))
    one.update(*(part[:, [at]] for part in inputs))
    every, _ = computed(*inputs)
    expected = {key: value for key, value in every.items() if key.startswith(name)}
    assert one.compute() == pytest.approx(expected, nan_ok=True)


def test_reset_forgets():
    metrics = TaskMetrics(SCHEMA)
    metrics.update(*some_rows(seed=1))
    metrics.reset()
    metrics.update(*some_rows())
    assert metrics.compute() == computed(*some_rows())[0]


def test_rows_scored_with_and_without_inference_mode_can_follow_each_other():
    metrics = TaskMetrics(SCHEMA)
    with torch.inference_mode():
        metrics.update(*some_rows(seed=1))
        metrics.reset()
    metrics.update(*some_rows())
    assert metrics.compute() == computed(*some_rows())[0]


def test_metrics_hold_nothing_for_the_checkpoint():
    metrics = TaskMetrics(SCHEMA)
    metrics.update(*some_rows())
    assert metrics.state_dict() == {}


def test_updates_do_not_wait_for_the_device():
    # Tensors on the meta device hold no values: reading one raises.
    TaskMetrics(SCHEMA).to("meta").update(*(part.to("meta") for part in some_rows()))
