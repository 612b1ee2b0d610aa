from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ranker.data.schema import DenseFeature, Schema, Task
from ranker.losses import MultitaskLoss, observed_counts

NAN, INF = math.nan, math.inf
# A regression between two binary tasks: the order of the columns must survive.
SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"),),
    tasks=(Task(name="click"), Task(name="watch", type="regression", weight=0.5), Task(name="like", weight=3.0)),
)
LOGITS = torch.tensor([[0.0, 2.0, 1.0], [2.0, 1.0, -1.0]])
LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 4.0, 0.0]])
SEEN = torch.ones(2, 3, dtype=torch.bool)


def softplus(z):
    return math.log1p(math.exp(z))


def test_each_task_is_the_mean_of_its_own_loss_and_the_total_is_weighted():
    loss = MultitaskLoss(SCHEMA)(LOGITS, LABELS, SEEN)
    click = (softplus(0) + softplus(2)) / 2  # label 1 at logit 0, label 0 at logit 2
    watch = (2.0**2 + 3.0**2) / 2
    like = softplus(-1)  # both rows the same
    torch.testing.assert_close(loss.task_T, torch.tensor([click, watch, like]))
    torch.testing.assert_close(loss.total, torch.tensor(click + 0.5 * watch + 3 * like))


def test_the_gradient_by_hand():
    logits = LOGITS.clone().requires_grad_()
    MultitaskLoss(SCHEMA)(logits, LABELS, SEEN).total.backward()
    p = torch.sigmoid(LOGITS)
    expected = torch.stack(
        [(p[:, 0] - LABELS[:, 0]) / 2, 0.5 * (LOGITS[:, 1] - LABELS[:, 1]), 3 * (p[:, 2] - LABELS[:, 2]) / 2], 1
    )
    torch.testing.assert_close(logits.grad, expected)


def test_a_mask_divides_by_what_is_observed_not_by_the_rows():
    mask = torch.tensor([[True, False, True], [False, True, True]])
    loss = MultitaskLoss(SCHEMA)(LOGITS, LABELS, mask)
    torch.testing.assert_close(loss.task_T, torch.tensor([softplus(0), 9.0, softplus(-1)]))


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30])
def test_what_is_not_observed_cannot_do_harm(junk):
    mask = torch.tensor([[True, True, False], [True, False, True]])
    logits, labels = LOGITS.clone(), LABELS.clone()
    logits[~mask] = labels[~mask] = junk
    logits.requires_grad_()
    loss = MultitaskLoss(SCHEMA)(logits, labels, mask)
    loss.total.backward()
    assert loss.total.isfinite()
    assert loss.task_T.isfinite().all()
    assert logits.grad[~mask].eq(0).all()
    assert logits.grad[mask].ne(0).all()


def test_a_task_without_labels_counts_exactly_zero():
    mask = torch.tensor([[True, True, False], [True, True, False]])
    logits = LOGITS.clone().requires_grad_()
    loss = MultitaskLoss(SCHEMA)(logits, LABELS, mask)
    loss.total.backward()
    assert loss.task_T[2].item() == 0.0
    assert logits.grad[:, 2].eq(0).all()


def test_an_empty_batch_is_zero_and_can_be_differentiated():
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = MultitaskLoss(SCHEMA)(logits, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool))
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert logits.grad.shape == (0, 3)


def test_an_observed_logit_that_is_not_finite_shows_in_the_loss():
    logits = LOGITS.clone()
    logits[0, 1] = NAN
    loss = MultitaskLoss(SCHEMA)(logits, LABELS, SEEN)
    assert loss.total.isnan()
    assert loss.task_T.isnan().tolist() == [False, True, False]


def test_huge_logits_keep_a_finite_loss_and_a_gradient():
    logits = torch.full((2, 3), 1e4).requires_grad_()
    loss = MultitaskLoss(SCHEMA)(logits, torch.zeros(2, 3), SEEN)
    loss.total.backward()
    torch.testing.assert_close(loss.task_T, torch.tensor([1e4, 1e8, 1e4]))
    assert logits.grad.isfinite().all()


def test_low_precision_logits_are_summed_in_single_precision():
    loss = MultitaskLoss(SCHEMA)(LOGITS.bfloat16(), LABELS, SEEN)
    assert loss.total.dtype == torch.float32


def test_a_schema_of_one_kind_of_task_will_do():
    for name in ("click", "watch"):
        few = SCHEMA.select(tasks=[name])
        at = SCHEMA.task_names.index(name)
        loss = MultitaskLoss(few)(LOGITS[:, [at]], LABELS[:, [at]], SEEN[:, [at]])
        torch.testing.assert_close(loss.task_T, MultitaskLoss(SCHEMA)(LOGITS, LABELS, SEEN).task_T[[at]])


def test_shares_of_ranks_average_to_the_loss_of_all_rows():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 3, generator=draw), torch.randint(0, 2, (9, 3), generator=draw).float()
    mask = torch.rand(9, 3, generator=draw) < 0.6
    whole = MultitaskLoss(SCHEMA)(logits, labels, mask)
    counts = observed_counts(mask)
    shares = [
        MultitaskLoss(SCHEMA).local(logits[rows], labels[rows], mask[rows], counts_T=counts, ranks=3)
        for rows in (slice(0, 7), slice(7, 9), slice(9, 9))
    ]
    torch.testing.assert_close(sum(share.total for share in shares) / 3, whole.total)
    torch.testing.assert_close(sum(share.task_T for share in shares) / 3, whole.task_T)


def test_nothing_waits_for_the_device():
    # Tensors on the meta device hold no values: reading one raises.
    loss = MultitaskLoss(SCHEMA).to("meta")
    assert loss(LOGITS.to("meta"), LABELS.to("meta"), SEEN.to("meta")).total.is_meta


CASES = {"uneven": 7, "one_rank_empty": 10}  # rows of rank 0 out of 10


def joined_batch():
    draw = torch.Generator().manual_seed(1)
    x, labels = torch.randn(10, 4, generator=draw), torch.randint(0, 2, (10, 3), generator=draw).float()
    mask = torch.rand(10, 3, generator=draw) < 0.5
    mask[7:] = torch.tensor([False, True, True])  # the second rank observes no label of the first task
    return x, labels, mask


def small_net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_two_ranks_have_the_gradient_of_one_process_on_the_joined_batch(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]

    x, labels, mask = joined_batch()
    net = small_net()
    whole = MultitaskLoss(SCHEMA)(net(x), labels, mask)
    whole.total.backward()
    for case in CASES:
        results = [torch.load(tmp_path / f"{case}_{rank}.pt", weights_only=True) for rank in range(2)]
        for result in results:
            for have, parameter in zip(result["grads"], net.parameters(), strict=True):
                torch.testing.assert_close(have, parameter.grad)
        torch.testing.assert_close((results[0]["task_T"] + results[1]["task_T"]) / 2, whole.task_T)


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, labels, mask = joined_batch()
    for case, cut in CASES.items():
        rows = slice(0, cut) if rank == 0 else slice(cut, 10)
        net = nn.parallel.DistributedDataParallel(small_net())
        loss = MultitaskLoss(SCHEMA)(net(x[rows]), labels[rows], mask[rows])
        loss.total.backward()
        grads = [parameter.grad for parameter in net.parameters()]
        torch.save({"grads": grads, "task_T": loss.task_T}, f"{folder}/{case}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
