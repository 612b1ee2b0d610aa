"""Tests of all models, and of the special cases in which one model equals another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ranker.data.batch import Batch, Ragged
from ranker.errors import UserError
from ranker.models import PLE, MMoE, SharedBottom

BUILD = {
    "shared": lambda s, **o: SharedBottom(s, hidden=[6, 5], **o),
    "cross": lambda s, **o: SharedBottom(s, hidden=[6], cross_layers=2, cross_rank=3, tower=[4], **o),
    "mmoe": lambda s, **o: MMoE(s, experts=3, expert_hidden=[6, 5], **o),
    "ple": lambda s, **o: PLE(s, levels=2, shared_experts=2, task_experts=1, expert_hidden=[6], tower=[4], **o),
}
every_model = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())


def copy_bottom(source, target):
    """Copies the weights of a shared bottom into a model with one expert."""
    target.embeddings.load_state_dict(source.embeddings.state_dict())
    target.heads.load_state_dict(source.heads.state_dict())
    expert = target.experts[0] if isinstance(target, MMoE) else target.levels[0].shared[0]
    expert.load_state_dict(source.bottom.state_dict())


@every_model
def test_logits_have_a_row_an_example_and_a_column_a_task(build, schema, make_batch):
    net = build(schema)
    for rows in (0, 1, 7):
        assert net(make_batch(schema, rows)).shape == (rows, 3)


@every_model
def test_a_rows_logits_do_not_depend_on_the_rows_beside_it(build, schema, make_batch):
    net, batch = build(schema), make_batch(schema, 8)
    order = torch.tensor([5, 2, 7])
    torch.testing.assert_close(net(batch.take(order)), net(batch)[order])


@every_model
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_reaches_every_parameter_also_of_an_empty_batch(build, schema, make_batch, sparse):
    net = build(schema, sparse_embeddings=sparse)
    net(make_batch(schema, 0)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    net(make_batch(schema, 200)).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if not p.grad.to_dense().any()]
    assert not dead


@every_model
def test_layers_worth_watching_exist_and_come_from_the_input_upward(build, schema):
    net = build(schema)
    names, parameters = net.layer_names(), dict(net.named_parameters())
    roles = ["bottom_first", "bottom_top", "head/click", "head/watch", "head/like"]
    if isinstance(net, SharedBottom) and net.cross is not None:
        roles.insert(0, "dcn")
        assert any(name.startswith(names["dcn"] + ".") for name in parameters)
    assert list(names) == roles
    assert all(f"{names[role]}.weight" in parameters for role in roles if role != "dcn")
    assert parameters[f"{names['bottom_first']}.weight"].shape[1] == net.input_width == 17


@every_model
def test_only_embedding_tables_are_called_embeddings_and_counts_follow(build, schema):
    net = build(schema)
    tables = sum(p.numel() for name, p in net.named_parameters() if name.startswith("embeddings."))
    # Width 2: 5 + 3 + 3 rows, width 3: 4 + 6 rows; the sequence shares.
    assert net.count_parameters() == {"embedding": 52, "dense": sum(p.numel() for p in net.parameters()) - 52}
    assert tables == 52


@every_model
def test_nothing_waits_for_the_device(build, schema, make_batch):
    # Tensors on the meta device hold no values: reading one raises.
    net = build(schema).to("meta")
    assert net(make_batch(schema, 4).to("meta")).shape == (4, 3)


class Served(nn.Module):
    """A model with plain tensors as inputs, like an exported program."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, dense, one_hot, tags, tags_at, seen, seen_at):
        none = dense.new_zeros(dense.shape[0], 0)
        ragged = {"tags": Ragged(tags, tags_at), "seen": Ragged(seen, seen_at)}
        return self.net(Batch(dense, one_hot, ragged, none, none.bool(), none.long(), none.long()))


def as_served(batch):
    tags, seen = batch.ragged["tags"], batch.ragged["seen"]
    return batch.dense_BF, batch.onehot_BC, tags.values, tags.offsets, seen.values, seen.offsets


@every_model
def test_an_exported_model_takes_batches_of_any_size(build, schema, make_batch):
    net = Served(build(schema)).eval()
    any_size = tuple({0: torch.export.Dim.AUTO} for _ in range(6))
    program = torch.export.export(net, as_served(make_batch(schema, 8)), dynamic_shapes=any_size).module()
    other = as_served(make_batch(schema, 21, seed=1))
    torch.testing.assert_close(program(*other), net(*other))


def test_dense_parameters_of_a_shared_bottom_by_hand(schema):
    # 17 inputs: 17*6 + 6, then 6*5 + 5, then three heads of 5 + 1; a full cross layer adds 17*17 + 17, its norm 2*17.
    assert SharedBottom(schema, hidden=[6, 5]).count_parameters()["dense"] == 108 + 35 + 18
    crossed = SharedBottom(schema, hidden=[6, 5], cross_layers=1)
    assert crossed.count_parameters()["dense"] == 108 + 35 + 18 + 306 + 34


def test_the_input_is_dense_features_then_embeddings(schema, make_batch):
    net, batch = SharedBottom(schema, hidden=[4]), make_batch(schema, 3)
    torch.testing.assert_close(net.features(batch), torch.cat([batch.dense_BF, net.embeddings(batch)], 1))


def test_shared_bottom_is_features_cross_mlp_heads_in_this_order(schema, make_batch):
    net, batch = SharedBottom(schema, hidden=[6], cross_layers=1), make_batch(schema, 5)
    torch.testing.assert_close(net(batch), net.heads(net.bottom(net.cross(net.features(batch)))))


def test_cross_layers_of_zeros_without_norm_leave_a_plain_shared_bottom(schema, make_batch):
    plain = SharedBottom(schema, hidden=[6])
    crossed = SharedBottom(schema, hidden=[6], cross_layers=2, cross_layer_norm=False)
    crossed.load_state_dict(plain.state_dict(), strict=False)
    for parameter in crossed.cross.parameters():
        torch.nn.init.zeros_(parameter)
    batch = make_batch(schema, 5)
    torch.testing.assert_close(crossed(batch), plain(batch))


def test_mmoe_of_one_expert_is_a_shared_bottom(schema, make_batch):
    shared = SharedBottom(schema, hidden=[6, 5], tower=[4])
    mmoe = MMoE(schema, experts=1, expert_hidden=[6, 5], tower=[4])
    copy_bottom(shared, mmoe)
    batch = make_batch(schema, 9)
    torch.testing.assert_close(mmoe(batch), shared(batch))


def test_ple_of_one_shared_expert_and_one_level_is_a_shared_bottom(schema, make_batch):
    shared = SharedBottom(schema, hidden=[6, 5])
    ple = PLE(schema, levels=1, shared_experts=1, task_experts=0, expert_hidden=[6, 5])
    copy_bottom(shared, ple)
    batch = make_batch(schema, 9)
    torch.testing.assert_close(ple(batch), shared(batch))


def test_ple_without_task_experts_is_mmoe(schema, make_batch):
    mmoe = MMoE(schema, experts=3, expert_hidden=[6])
    ple = PLE(schema, levels=1, shared_experts=3, task_experts=0, expert_hidden=[6])
    ple.embeddings.load_state_dict(mmoe.embeddings.state_dict())
    ple.heads.load_state_dict(mmoe.heads.state_dict())
    ple.levels[0].shared.load_state_dict(mmoe.experts.state_dict())
    ple.levels[0].gates.load_state_dict(mmoe.gates.state_dict())
    batch = make_batch(schema, 9)
    torch.testing.assert_close(ple(batch), mmoe(batch))


def test_mmoe_mixes_experts_by_each_tasks_own_gate(schema, make_batch):
    net, batch = MMoE(schema, experts=3, expert_hidden=[6]), make_batch(schema, 4)
    x_BD = net.features(batch)
    weights_BTE = net.gate(x_BD)
    torch.testing.assert_close(weights_BTE.sum(-1), torch.ones(4, 3))
    logits = []
    for t, (gate, head) in enumerate(zip(net.gates, net.heads.linear.values(), strict=True)):
        share_BE = torch.softmax(x_BD @ gate.weight.T, -1)
        torch.testing.assert_close(weights_BTE[:, t], share_BE)
        mixed = sum(share_BE[:, e, None] * expert(x_BD) for e, expert in enumerate(net.experts))
        logits.append(head(mixed))
    torch.testing.assert_close(net(batch), torch.cat(logits, 1))


def test_a_task_of_ple_sees_its_own_and_shared_experts_but_no_other_tasks(schema, make_batch):
    net = PLE(schema, levels=1, shared_experts=1, task_experts=1, expert_hidden=[6])
    net(make_batch(schema, 50))[:, 0].sum().backward()
    level = net.levels[0]
    assert level.shared[0].layers[0].weight.grad.any()
    assert level.own[0][0].layers[0].weight.grad.any()
    assert not any(level.own[t][0].layers[0].weight.grad.any() for t in (1, 2))


def test_ple_by_the_equations(schema, make_batch):
    net = PLE(schema, levels=2, shared_experts=1, task_experts=1, expert_hidden=[6])
    batch = make_batch(schema, 4)
    x = net.features(batch)
    first, second = net.levels

    def mix(gate, stream, outputs):
        share = torch.softmax(stream @ gate.weight.T, -1)
        return sum(share[:, i, None] * out for i, out in enumerate(outputs))

    shared = first.shared[0](x)
    own = [group[0](x) for group in first.own]
    streams = [mix(gate, x, [shared, out]) for gate, out in zip(first.gates, own, strict=True)]
    shared_stream = mix(first.shared_gate, x, [shared, *own])
    logits = []
    for t, head in enumerate(net.heads.linear.values()):
        outputs = [second.shared[0](shared_stream), second.own[t][0](streams[t])]
        logits.append(head(mix(second.gates[t], streams[t], outputs)))
    assert second.shared_gate is None
    torch.testing.assert_close(net(batch), torch.cat(logits, 1))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda s: SharedBottom(s, hidden=[]), "hidden is empty"),
        (lambda s: SharedBottom(s, hidden=[4], cross_layers=-1), "cross_layers"),
        (lambda s: SharedBottom(s, hidden=[4], cross_layers=1, cross_rank=0), "cross_rank"),
        (lambda s: SharedBottom(s, hidden=[4], cross_rank=2), "cross_rank"),
        (lambda s: MMoE(s, experts=0, expert_hidden=[4]), "experts"),
        (lambda s: MMoE(s, experts=2, expert_hidden=[]), "expert_hidden is empty"),
        (lambda s: PLE(s, levels=0, shared_experts=1, task_experts=1, expert_hidden=[4]), "levels"),
        (lambda s: PLE(s, levels=1, shared_experts=0, task_experts=1, expert_hidden=[4]), "shared_experts"),
        (lambda s: PLE(s, levels=1, shared_experts=1, task_experts=1, expert_hidden=[4], tower=[0]), "tower"),
    ],
)
def test_values_that_make_no_model_are_refused_by_name(schema, build, said):
    with pytest.raises(UserError, match=said):
        build(schema)
