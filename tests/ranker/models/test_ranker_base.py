from __future__ import annotations

import torch

from ranker.models.ranker_base import Heads

TASKS = ["keys", "train", "click"]  # names that torch.nn.Module and ModuleDict use themselves


def set_linear(heads):
    with torch.no_grad():
        for index, layer in enumerate(heads.linear.values()):
            layer.weight.fill_(index + 1.0)
            layer.bias.fill_(10.0 * index)


def test_logits_come_in_the_order_of_the_tasks():
    heads = Heads(TASKS, 2)
    set_linear(heads)
    # h sums to 3: 1*3 + 0, 2*3 + 10, 3*3 + 20.
    torch.testing.assert_close(heads(torch.tensor([[1.0, 2.0]])), torch.tensor([[3.0, 16.0, 29.0]]))


def test_each_task_reads_its_own_representation_where_it_has_one():
    heads = Heads(TASKS, 2)
    set_linear(heads)
    h_BTH = torch.tensor([[[1.0, 2.0], [0.0, 1.0], [5.0, 0.0]]])
    torch.testing.assert_close(heads(h_BTH), torch.tensor([[3.0, 12.0, 35.0]]))


def test_the_same_representation_for_all_gives_what_sharing_it_gives():
    for tower in ([], [4, 3]):
        heads = Heads(TASKS, 5, tower=tower)
        h_BH = torch.randn(6, 5)
        torch.testing.assert_close(heads(h_BH[:, None].expand(6, 3, 5)), heads(h_BH))


def test_every_head_is_a_tensor_of_its_own_named_by_its_task():
    names = [name for name, _ in Heads(TASKS, 2).named_parameters() if name.endswith("weight")]
    assert names == [f"linear.task_{task}.weight" for task in TASKS]


def test_a_gradient_of_one_task_leaves_the_other_heads_alone():
    heads = Heads(TASKS, 2, tower=[3])
    heads(torch.randn(4, 2))[:, 1].sum().backward()
    touched = {name.split(".")[1] for name, p in heads.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"task_train"}


def test_heads_on_mixtures_give_what_mixing_first_gives_backward_too():
    for tower in ([], [4, 3]):
        heads, leaves = Heads(TASKS, 5, tower=tower), [torch.randn(6, 5, requires_grad=True) for _ in range(4)]
        weights_BTE = torch.randn(6, 3, 4).softmax(-1).requires_grad_()
        every = [weights_BTE, *leaves, *heads.parameters()]
        aside = torch.randn(6, 3)
        logits_BT = heads.of_mixtures(weights_BTE, leaves)
        mixed_first_BT = heads(
            torch.stack([sum(weights_BTE[:, t, e, None] * leaves[e] for e in range(4)) for t in range(3)], 1)
        )
        torch.testing.assert_close(logits_BT, mixed_first_BT)
        for have, want in zip(
            torch.autograd.grad((logits_BT * aside).sum(), every),
            torch.autograd.grad((mixed_first_BT * aside).sum(), every),
            strict=True,
        ):
            torch.testing.assert_close(have, want)


def test_mixing_for_linear_heads_makes_no_tensor_of_a_row_a_task_and_a_unit():
    heads, sizes = Heads(TASKS, 64), []
    outputs, weights_BTE = [torch.randn(8, 64, requires_grad=True) for _ in range(2)], torch.rand(8, 3, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        heads.of_mixtures(weights_BTE, outputs).sum().backward()
    assert sizes
    assert max(sizes) <= 8 * 64
