"""Row weights in the training loss: a row of weight w counts like w equal rows, and no weights change no bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ranker.data.batch import NO_GROUP
from ranker.data.schema import DenseFeature, GroupColumn, Schema, Task
from ranker.errors import UserError
from ranker.losses import BPR, JRC, MultitaskLoss, SoftmaxLoss, best_constants

SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"),),
    tasks=(
        Task(name="click"),
        Task(name="watch", type="regression", weight=0.5),
        Task(name="like", weight=3.0, group="session"),
    ),
    groups=(GroupColumn(name="user"), GroupColumn(name="session")),
)
LOSSES = {"pointwise": None, "bpr": BPR(negatives=100), "softmax": SoftmaxLoss(weight=0.5), "jrc": JRC(alpha=0.3)}


def some_rows(rows=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 5, (rows, 2), generator=draw)
    keys[torch.rand(rows, 2, generator=draw) < 0.1] = NO_GROUP
    return {
        "logits_BT": torch.randn(rows, 3, generator=draw),
        "labels_BT": (torch.rand(rows, 3, generator=draw) < 0.4).float(),
        "mask_BT": torch.rand(rows, 3, generator=draw) < 0.8,
        "groups_BG": keys,
    }


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_weight_w_has_the_gradient_of_w_rows(name):
    rows = some_rows()
    weight_B = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(1))
    rows["groups_BG"] = rows["groups_BG"].abs() % 5  # a copy of a row without a key would be another group
    found = []
    for index in (torch.arange(24), torch.arange(24).repeat_interleave(weight_B)):
        logits_BT = rows["logits_BT"].clone().requires_grad_()
        inputs = {name: (logits_BT if name == "logits_BT" else column)[index] for name, column in rows.items()}
        weighted = weight_B.float() if len(index) == 24 else None
        loss = MultitaskLoss(SCHEMA, LOSSES[name])(**inputs, weight_B=weighted)
        loss.total.backward()
        found.append((loss, logits_BT.grad))
    (weighted, grad), (repeated, expected) = found
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(weighted.task_T, repeated.task_T)
    if name != "pointwise":
        assert weighted.ranking_T[[0, 2]].gt(0).all()
        assert weighted.ranking_T[1] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_of_the_weights_does_not_matter(name):
    rows, weight_B = some_rows(), torch.rand(24)
    loss = MultitaskLoss(SCHEMA, LOSSES[name])
    one, other = (loss(**rows, weight_B=factor * weight_B) for factor in (1.0, 1e-4))
    torch.testing.assert_close(one.total, other.total)


def test_without_weights_every_bit_is_that_of_a_plain_masked_mean():
    rows = some_rows()
    logits_BT = rows["logits_BT"].requires_grad_()
    found = MultitaskLoss(SCHEMA)(logits_BT, rows["labels_BT"], rows["mask_BT"], groups_BG=rows["groups_BG"])
    mask, z = rows["mask_BT"], torch.where(rows["mask_BT"], logits_BT, 0.0)
    y = torch.where(mask, rows["labels_BT"], 0.0)
    at, count_T = [0, 2], mask.sum(0)
    log_loss = F.binary_cross_entropy_with_logits(z[:, at], y[:, at], reduction="none") * mask[:, at]
    click, like = log_loss.sum(0)
    task_T = torch.stack([click, (z[:, 1] - y[:, 1]).square().sum(), like]) * (1 / count_T.float())
    assert torch.equal(found.task_T, task_T)
    assert torch.equal(found.total, (task_T * torch.tensor([1.0, 0.5, 3.0])).sum())
    assert found.ranking_T is None


def test_rows_of_weight_zero_cannot_do_harm_even_in_an_empty_task():
    rows = some_rows()
    weight_B = torch.zeros(24)
    for loss in LOSSES.values():
        logits_BT = rows["logits_BT"].clone().requires_grad_()
        found = MultitaskLoss(SCHEMA, loss)(**{**rows, "logits_BT": logits_BT}, weight_B=weight_B)
        found.total.backward()
        assert found.total.item() == 0.0
        assert logits_BT.grad.eq(0).all()


def test_best_constants_of_weighted_rows_minimise_the_weighted_loss():
    rows, weight_B = some_rows(rows=4000), torch.rand(4000) * 1e3
    observed = (rows["labels_BT"], rows["mask_BT"])
    constant_T = best_constants(SCHEMA, *observed, weight_B).requires_grad_()
    loss = MultitaskLoss(SCHEMA)(constant_T.expand(4000, 3), *observed, weight_B=weight_B)
    loss.total.backward()
    assert constant_T.grad.abs().max() < 2e-3
    assert torch.equal(best_constants(SCHEMA, *observed), best_constants(SCHEMA, *observed, None))
    same_T = best_constants(SCHEMA, *observed, torch.full((4000,), 7.0))
    torch.testing.assert_close(same_T, best_constants(SCHEMA, *observed))


def test_a_ranking_loss_without_groups_says_what_to_do():
    plain = Schema(name="plain", time_column="t", dense=SCHEMA.dense, tasks=(Task(name="click"),))
    with pytest.raises(UserError, match="loss=bpr compares rows of the same group, but schema 'plain' has none"):
        MultitaskLoss(plain, BPR())
    with pytest.raises(UserError, match=r"loss.ranking.tasks: 'watch' is no binary task"):
        MultitaskLoss(SCHEMA, JRC(tasks=["watch"]))
    rows = some_rows()
    with pytest.raises(UserError, match="needs rows with a group"):
        MultitaskLoss(SCHEMA, JRC())(rows["logits_BT"], rows["labels_BT"], rows["mask_BT"])


CUTS = {"uneven": 16, "one_rank_empty": 24}  # rows of rank 0 out of 24


def joined_batch():
    """Rows whose groups do not cross the cut between the ranks."""
    rows = some_rows(seed=3)
    rows["groups_BG"] = torch.stack([torch.arange(24) // 4, torch.arange(24) // 8], 1)
    rows["x_BF"] = torch.randn(24, 4, generator=torch.Generator().manual_seed(5))
    del rows["logits_BT"]
    rows["weight_B"] = torch.rand(24, generator=torch.Generator().manual_seed(4))
    return rows


def trained(rows, loss, *, wrap=lambda net: net):
    torch.manual_seed(2)
    net = wrap(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    rows = dict(rows)
    found = MultitaskLoss(SCHEMA, loss)(net(rows.pop("x_BF")), **rows)
    found.total.backward()
    parts = {"task": found.task_T, "ranking": found.ranking_T if loss else torch.zeros(3)}
    return {"grads": [parameter.grad for parameter in net.parameters()]} | parts


def test_two_ranks_have_the_gradient_of_one_process_on_the_joined_batch(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    for name, loss in LOSSES.items():
        whole = trained(joined_batch(), loss)
        for cut in CUTS:
            results = [torch.load(tmp_path / f"{name}_{cut}_{rank}.pt", weights_only=True) for rank in range(2)]
            for part in ("task", "ranking"):
                torch.testing.assert_close((results[0][part] + results[1][part]) / 2, whole[part])
            for result in results:
                for have, wanted in zip(result["grads"], whole["grads"], strict=True):
                    torch.testing.assert_close(have, wanted)


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, loss in LOSSES.items():
        for case, cut in CUTS.items():
            own = slice(0, cut) if rank == 0 else slice(cut, 24)
            share = {key: column[own] for key, column in joined_batch().items()}
            result = trained(share, loss, wrap=nn.parallel.DistributedDataParallel)
            torch.save(result, f"{folder}/{name}_{case}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
