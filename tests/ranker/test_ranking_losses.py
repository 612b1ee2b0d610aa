"""BPR, softmax and JRC against their definitions in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from ranker.data.batch import NO_GROUP
from ranker.errors import UserError
from ranker.losses import BPR, JRC, RankingLoss, SoftmaxLoss
from ranker.losses.groups import Groups

INF, NAN = math.inf, math.nan


def some_rows(rows=40, seed=0, groups=6):
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, groups, (rows,), generator=draw) * 10**15
    keys[torch.rand(rows, generator=draw) < 0.15] = NO_GROUP
    label, seen = torch.rand(rows, generator=draw) < 0.4, torch.rand(rows, generator=draw) < 0.85
    z, w = torch.randn(rows, generator=draw), torch.rand(rows, generator=draw) + 0.1
    return z, seen & label, seen & ~label, w, keys


def lists(positive, negative, keys):
    """Positive and negative rows of each group; a row without a key is a group of its own."""
    seen = (positive | negative).nonzero()[:, 0].tolist()
    names = {row: row if keys[row] == NO_GROUP else f"key {int(keys[row])}" for row in seen}
    for name in dict.fromkeys(names.values()):
        inside = [row for row in seen if names[row] == name]
        yield [row for row in inside if positive[row]], [row for row in inside if negative[row]]


def slow_bpr(z, positive, negative, w, keys):
    total = count = torch.zeros(())
    for up, down in lists(positive, negative, keys):
        for i in up if down else []:
            terms = sum(w[j] * torch.log1p(torch.exp(z[j] - z[i])) for j in down)
            total, count = total + w[i] * terms / sum(w[j] for j in down), count + w[i]
    return total / count


def slow_softmax(z, positive, negative, w, keys):
    total = count = torch.zeros(())
    for up, down in lists(positive, negative, keys):
        for i in up if down else []:
            whole = torch.log(sum(w[j] * torch.exp(z[j]) for j in (*up, *down)))
            total, count = total + w[i] * (whole - z[i] - torch.log(w[i])), count + w[i]
    return total / count


def slow_jrc(z, positive, negative, w, keys):
    total = count = torch.zeros(())
    for up, down in lists(positive, negative, keys):
        for rows, sign in ((up, 1), (down, -1)):
            for i in rows:
                whole = torch.log(sum(w[j] * torch.exp(sign * z[j] / 2) for j in (*up, *down)))
                own = sign * z[i] / 2 + torch.log(w[i])
                total, count = total + w[i] * (whole - own), count + w[i]
    return total / count


def loss_of(loss: RankingLoss, z, positive, negative, w, keys):
    groups = Groups.of(keys)
    return loss.sums(z, positive, negative, w, groups) / loss.denominator(positive, negative, w, groups)


CASES = [(BPR(), slow_bpr), (SoftmaxLoss(), slow_softmax), (JRC(), slow_jrc)]
NAMES = [loss.name for loss, _ in CASES]


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_are_those_of_the_definition(loss, slow, seed):
    z, *rows = some_rows(seed=seed)
    fast_z, slow_z = z.clone().requires_grad_(), z.clone().requires_grad_()
    fast, expected = loss_of(loss, fast_z, *rows), slow(slow_z, *rows)
    torch.testing.assert_close(fast, expected)
    fast.backward()
    expected.backward()
    torch.testing.assert_close(fast_z.grad, slow_z.grad)


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=NAMES)
def test_the_order_of_the_rows_does_not_matter(loss, slow):
    rows = some_rows()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(loss_of(loss, *rows), loss_of(loss, *(column[order] for column in rows)))


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=NAMES)
def test_huge_logits_keep_loss_and_gradient_finite(loss, slow):
    z, *rows = some_rows()
    z = (1e4 * z).requires_grad_()
    loss_of(loss, z, *rows).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=NAMES)
@pytest.mark.parametrize("junk", [NAN, INF])
def test_rows_that_do_not_count_cannot_do_harm_and_others_show(loss, slow, junk):
    z, positive, negative, w, keys = some_rows()
    outside = ~(positive | negative)
    spoiled = torch.where(outside, 0.0, z)  # MultitaskLoss replaces unobserved logits by 0
    expected = loss_of(loss, z, positive, negative, w, keys)
    torch.testing.assert_close(loss_of(loss, spoiled, positive, negative, w, keys), expected)
    counted = int((negative & (keys == keys[positive.nonzero()[0, 0]])).nonzero()[0, 0])
    spoiled[counted] = junk
    assert not loss_of(loss, spoiled, positive, negative, w, keys).isfinite()


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=NAMES)
def test_rows_alone_in_their_group_have_nothing_to_compare_with(loss, slow):
    z, positive, negative, w, _ = some_rows()
    for keys in (torch.arange(40), torch.full((40,), NO_GROUP)):
        assert loss.sums(z, positive, negative, w, Groups.of(keys)).abs() < 1e-5
    nothing = Groups.of(torch.zeros(0, dtype=torch.int64))
    assert loss.sums(z[:0], positive[:0], negative[:0], w[:0], nothing) == 0


@pytest.mark.parametrize(("loss", "slow"), CASES, ids=NAMES)
def test_nothing_waits_for_the_device(loss, slow):
    # Tensors on the meta device hold no values: reading one raises.
    rows = [column.to("meta") for column in some_rows()]
    assert loss_of(loss, *rows).is_meta


def test_bpr_with_few_negatives_takes_that_many_and_different_ones():
    keys, w = torch.zeros(12, dtype=torch.int64), torch.ones(12)
    positive = torch.arange(12) < 4
    z = torch.zeros(12).requires_grad_()
    loss_of(BPR(negatives=2), z, positive, ~positive, w, keys).backward()
    # Four positives with two of the eight negatives each: every negative is compared once.
    torch.testing.assert_close(z.grad[4:], torch.full((8,), 0.5 / 8))
    torch.testing.assert_close(z.grad[:4], torch.full((4,), -0.5 / 4))


def test_jrc_of_one_group_by_hand():
    z = torch.tensor([2.0, 0.0])
    positive = torch.tensor([True, False])
    found = loss_of(JRC(), z, positive, ~positive, torch.ones(2), torch.zeros(2, dtype=torch.int64))
    # Both rows lose log(1 + e^-1): the logits of the two labels are half of z apart.
    assert float(found) == pytest.approx(math.log1p(math.exp(-1)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BPR(negatives=0), "loss.ranking.negatives"),
        (lambda: BPR(pointwise=0.0), "loss.ranking.pointwise"),
        (lambda: SoftmaxLoss(weight=-1.0), "loss.ranking.weight"),
        (lambda: SoftmaxLoss(weight=NAN), "loss.ranking.weight"),
        (lambda: JRC(alpha=0.0), "loss.ranking.alpha"),
        (lambda: JRC(alpha=1.5), "loss.ranking.alpha"),
    ],
)
def test_options_that_make_no_loss_are_one_line(make, said):
    with pytest.raises(UserError, match=said):
        make()
