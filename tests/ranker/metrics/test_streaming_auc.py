from __future__ import annotations

import math

import pytest
import torch

from ranker.data.schema import DenseFeature, Schema, Task
from ranker.errors import UserError
from ranker.metrics import StreamingAUC

NAN, INF = math.nan, math.inf
SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"),),
    tasks=(Task(name="click"), Task(name="watch", type="regression", transform="log1p"), Task(name="like")),
)


def one_task(logits, labels, mask=None, *, task=0):
    """Inputs in which only one task's column has observed labels."""
    rows = len(logits)
    z, y, m = torch.zeros(rows, 3), torch.zeros(rows, 3), torch.zeros(rows, 3, dtype=torch.bool)
    z[:, task], y[:, task] = torch.tensor(logits), torch.tensor(labels)
    m[:, task] = True if mask is None else torch.tensor(mask)
    return z, y, m


def auc_by_pairs(scores, labels):
    positive, negative = scores[labels == 1], scores[labels == 0]
    difference = positive[:, None].double() - negative[None]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


def some_rows(rows=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, generator=draw).mul(4).round() / 4  # rounded, so that there are ties
    labels = (torch.rand(rows, 3, generator=draw) < 0.4).float()
    return logits, labels, torch.rand(rows, 3, generator=draw) < 0.7


def streamed(*inputs, **options):
    stream = StreamingAUC(SCHEMA, **options)
    stream.update(*inputs)
    return stream.stats()


def test_running_auc_is_exact_where_scores_fall_into_different_bins():
    # Quarter steps of the logit over bins of 3/64: no two different scores share a bin.
    logits, labels, mask = some_rows()
    auc_T = streamed(logits, labels, mask).auc_T
    for at in (0, 2):
        seen = mask[:, at]
        assert auc_T[at].item() == pytest.approx(auc_by_pairs(logits[seen, at], labels[seen, at]), abs=1e-6)
    assert auc_T[1].isnan()


def test_running_auc_is_close_on_a_rare_task_with_small_probabilities():
    draw = torch.Generator().manual_seed(0)
    labels = (torch.rand(20_000, 3, generator=draw) < 0.01).float()
    logits = torch.randn(20_000, 3, generator=draw) - 7 + labels
    mask = torch.ones_like(labels, dtype=torch.bool)
    auc_T = streamed(logits, labels, mask).auc_T
    assert auc_T[0].item() == pytest.approx(auc_by_pairs(logits[:, 0], labels[:, 0]), abs=1e-3)


def test_the_past_fades_by_the_decay():
    right, wrong = one_task([2.0, -2.0], [1.0, 0.0]), one_task([-2.0, 2.0], [1.0, 0.0])
    stream = StreamingAUC(SCHEMA, decay=0.5)
    stream.update(*right)
    stream.update(*wrong)
    # Weights 1/2 and 1: right pairs 1/2 * 1/2, ties half of 2 * 1/2, of (3/2)^2 in all.
    assert stream.stats().auc_T[0].item() == pytest.approx((0.25 + 0.5) / 2.25)


def test_scores_beyond_the_range_count_in_the_outermost_bins():
    assert streamed(*one_task([1e30, -1e30], [1.0, 0.0])).auc_T[0].item() == 1.0


def test_running_auc_of_one_class_is_nan():
    assert streamed(*one_task([1.0, 2.0], [1.0, 1.0])).auc_T[0].isnan()


def test_logits_that_are_not_finite_are_counted_apart():
    stats = streamed(*one_task([2.0, NAN, INF, 1.0], [1.0, 1.0, 0.0, 0.0]))
    assert stats.nonfinite_T.tolist() == [2.0, 0.0, 0.0]
    assert stats.auc_T[0].item() == 1.0
    assert stats.spread_T[0].item() == pytest.approx(0.5)


def test_all_logits_lost_leaves_nan_and_no_crash():
    stream = StreamingAUC(SCHEMA)
    logits, labels, mask = some_rows()
    stream.update(torch.full_like(logits, NAN), labels, mask)
    stats = stream.stats()
    assert stats.spread_T.isnan().all()
    assert stats.nonfinite_T.tolist() == [60.0] * 3


def test_spread_is_that_of_the_last_batch_and_zero_for_a_dead_model():
    stream = StreamingAUC(SCHEMA)
    logits, labels, mask = some_rows()
    stream.update(logits, labels, mask)
    torch.testing.assert_close(stream.stats().spread_T, logits.std(0, correction=0))
    stream.update(torch.full_like(logits, -3.71), labels, mask)
    assert stream.stats().spread_T.tolist() == [0.0] * 3


def test_the_running_auc_goes_on_from_a_checkpoint():
    stream, other = StreamingAUC(SCHEMA), StreamingAUC(SCHEMA)
    stream.update(*some_rows())
    other.load_state_dict(stream.state_dict())
    for each in (stream, other):
        each.update(*some_rows(seed=1))
    assert torch.equal(stream.stats().auc_T[[0, 2]], other.stats().auc_T[[0, 2]])
    stream.reset()
    assert stream.stats().auc_T.isnan().all()


def test_an_empty_batch_changes_no_auc():
    stream = StreamingAUC(SCHEMA, decay=1.0)
    stream.update(*some_rows())
    before = stream.stats().auc_T
    stream.update(*(part[:0] for part in some_rows()))
    assert torch.equal(stream.stats().auc_T[[0, 2]], before[[0, 2]])


def test_updates_do_not_wait_for_the_device():
    # Tensors on the meta device hold no values: reading one raises.
    inputs = [part.to("meta") for part in some_rows()]
    stream = StreamingAUC(SCHEMA).to("meta")
    stream.update(*inputs)
    assert stream.stats().auc_T.is_meta


@pytest.mark.parametrize("options", [{"bins": 1}, {"logit_range": 0.0}, {"decay": 1.5}])
def test_options_that_make_no_histogram_are_refused(options):
    with pytest.raises(UserError, match="streaming AUC"):
        StreamingAUC(SCHEMA, **options)


def test_a_schema_of_one_task_gives_one_number():
    stream = StreamingAUC(SCHEMA.select(tasks=["click"]))
    stream.update(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [0.0]]), torch.ones(2, 1, dtype=torch.bool))
    assert stream.stats().auc_T.tolist() == [1.0]


def test_the_batch_alone_has_an_auc_and_counts_of_its_own():
    """Two models after one another: the running AUC mixes their scores, that of the batch does not."""
    stream = StreamingAUC(SCHEMA, decay=1.0)
    right, wrong = [2.0, -2.0, 3.0, 1.0], [0.0, 5.0, 0.0, 5.0]
    for logits, expected in ((right, 1.0), (wrong, 0.0), (right, 1.0)):
        stream.update(*one_task(logits, [1.0, 0.0, 1.0, 0.0]))
        assert stream.stats().batch_auc_T[0] == expected
    stats = stream.stats()
    assert 0.0 < float(stats.auc_T[0]) < 1.0
    assert stats.positives_T.tolist() == [2.0, 0.0, 0.0]
    assert stats.labels_T.tolist() == [4.0, 0.0, 0.0]
    stream.update(*one_task(right, [1.0, 2.0, 0.5, 0.1], [True, False, True, True], task=1))
    stats = stream.stats()
    assert bool(stats.batch_auc_T.isnan().all())
    assert stats.positives_T.tolist() == [0.0, 0.0, 0.0]
    assert stats.labels_T.tolist() == [0.0, 3.0, 0.0]
    assert float(stats.variance_T[1]) == pytest.approx(torch.tensor([1.0, 0.5, 0.1]).var(correction=0))
    assert math.isnan(stats.variance_T[0])


def test_weights_count_like_copies_and_make_the_numbers_of_labels_effective():
    logits, labels, mask = some_rows()
    weight = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(1))
    weighted, repeated = StreamingAUC(SCHEMA), StreamingAUC(SCHEMA)
    weighted.update(logits, labels, mask, weight.float())
    repeated.update(*(column.repeat_interleave(weight, 0) for column in (logits, labels, mask)))
    one, other = weighted.stats(), repeated.stats()
    for name in ("auc_T", "batch_auc_T", "variance_T"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True)
    torch.testing.assert_close(one.positives_T / one.labels_T, other.positives_T / other.labels_T)
    w = weight[:, None] * mask
    torch.testing.assert_close(one.labels_T, w.sum(0).square() / w.square().sum(0))
    # Of equal weights, the effective number is the number.
    for factor in (1.0, 0.01):
        weighted.update(logits, labels, mask, torch.full((60,), factor))
        torch.testing.assert_close(weighted.stats().labels_T, mask.sum(0).float())
    weighted.update(logits, labels, mask & False, weight.float())
    assert weighted.stats().labels_T.tolist() == [0.0] * 3
    assert weighted.stats().positives_T.tolist() == [0.0] * 3


def test_values_that_are_kept_do_not_keep_the_histograms():
    logits, labels, mask = some_rows()
    values = streamed(logits, labels, mask)
    together = StreamingAUC(SCHEMA).update_all(logits[None], labels[None], mask[None])
    assert all(value.untyped_storage().nbytes() <= 200 for value in (*values, *together))
