from __future__ import annotations

import dataclasses

import pytest
import torch

from ranker.data.batch import Ragged
from ranker.data.schema import CategoricalFeature, Schema, Task
from ranker.errors import UserError
from ranker.models.embeddings import EmbeddingTables, by_bag, by_gather


def numbered(schema, **options):
    """Tables whose entries are 100 * width + row + column / 10, so that a value identifies its entry."""
    tables = EmbeddingTables(schema, **options)
    with torch.no_grad():
        for weight in tables.parameters():
            rows, dim = weight.shape
            weight.copy_(100 * dim + torch.arange(rows)[:, None] + torch.arange(dim) / 10)
    return tables


def by_hand(tables, schema, batch):
    """One lookup per feature and row, in the schema's order. Rows of a width: tables in the order of their owners."""
    start, filled = {}, {}
    for feature in schema.categorical:
        if not feature.table:
            start[feature.name] = filled.get(feature.embedding_dim, 0)
            filled[feature.embedding_dim] = start[feature.name] + feature.rows
    columns, position = [], 0
    for feature in schema.categorical:
        weight = tables.tables[f"dim_{feature.embedding_dim}"].weight
        table = weight[start[schema.table_of(feature).name] :]
        if feature.kind == "one_hot":
            columns.append(table[batch.onehot_BC[:, position]])
            position += 1
        else:
            lists = batch.ragged[feature.name]
            pooled = []
            for row in range(len(batch)):
                ids = lists.values[lists.offsets[row] : lists.offsets[row + 1]]
                pooled.append(table[ids].mean(0) if len(ids) else torch.zeros(feature.embedding_dim))
            columns.append(torch.stack(pooled))
    return torch.cat(columns, 1)


def test_features_come_out_in_the_schemas_order_each_from_its_own_table(schema, make_batch):
    tables = numbered(schema)
    one_row = dataclasses.replace(
        make_batch(schema, 1),
        onehot_BC=torch.tensor([[1, 2, 0, 1]]),
        ragged={
            "tags": Ragged(torch.tensor([3, 1]), torch.tensor([0, 2])),
            "seen": Ragged(torch.tensor([5]), torch.tensor([0, 1])),
        },
    )
    # Width 2: user rows 0-4, hour 5-7, city 8-10. Width 3: tags rows 0-3, item (and seen) 4-9.
    expected = [
        *(201.0, 201.1),  # user 1
        *(302.0, 302.1, 302.2),  # mean of tags 3 and 1
        *(306.0, 306.1, 306.2),  # item 2
        *(205.0, 205.1),  # hour 0
        *(309.0, 309.1, 309.2),  # seen 5, in item's table
        *(209.0, 209.1),  # city 1
    ]
    torch.testing.assert_close(tables(one_row), torch.tensor([expected]))


@pytest.mark.parametrize("sparse", [False, True])
def test_values_and_gradients_equal_one_lookup_a_feature(schema, make_batch, sparse):
    batch = make_batch(schema, 17)
    tables = EmbeddingTables(schema, sparse=sparse)
    expected = by_hand(tables, schema, batch)
    out = tables(batch)
    torch.testing.assert_close(out, expected)

    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, list(tables.parameters()), upstream)
    given = torch.autograd.grad(out, list(tables.parameters()), upstream)
    for have, want in zip(given, wanted, strict=True):
        assert have.is_sparse == sparse
        torch.testing.assert_close(have.to_dense() if sparse else have, want)


def test_an_empty_list_pools_to_zero(schema, make_batch):
    batch = make_batch(schema, 2)
    lists = Ragged(torch.tensor([2]), torch.tensor([0, 0, 1]))
    batch = dataclasses.replace(batch, ragged={"tags": lists, "seen": lists})
    out = numbered(schema)(batch)
    assert out[0, 2:5].eq(0).all()
    assert out[1, 2:5].ne(0).all()


def test_ids_of_a_slice_that_starts_in_the_middle_stay_with_their_rows(schema, make_batch):
    batch = make_batch(schema, 9)
    tables = EmbeddingTables(schema)
    torch.testing.assert_close(tables(batch.slice(3, 7)), tables(batch)[3:7])


@pytest.mark.parametrize("sparse", [False, True])
def test_an_empty_batch_passes_forward_and_backward(schema, make_batch, sparse):
    tables = EmbeddingTables(schema, sparse=sparse)
    out = tables(make_batch(schema, 0))
    assert out.shape == (0, tables.output_width) == (0, 15)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.to_dense().eq(0).all() for p in tables.parameters())


def test_forty_features_of_one_width_are_one_weight_and_one_piece(make_batch):
    features = tuple(CategoricalFeature(name=f"c{i}", num_embeddings=10 + i, embedding_dim=4) for i in range(40))
    wide = Schema(name="wide", time_column="t", categorical=features, tasks=(Task(name="click"),))
    tables = EmbeddingTables(wide)
    assert [tuple(p.shape) for p in tables.parameters()] == [(sum(11 + i for i in range(40)), 4)]
    assert len(tables.pieces(make_batch(wide, 3))) == 1


def test_a_schema_without_categorical_features_gives_no_columns(schema, make_batch):
    numbers = schema.select(features=["x", "y"])
    assert EmbeddingTables(numbers)(make_batch(numbers, 3)).shape == (3, 0)


@pytest.mark.parametrize("kept", [["tags", "seen"], ["user", "hour"]])
def test_only_ragged_or_only_one_hot_features_will_do(schema, make_batch, kept):
    some = schema.select(features=kept)
    batch = make_batch(some, 5)
    tables = EmbeddingTables(some)
    torch.testing.assert_close(tables(batch), by_hand(tables, some, batch))


def test_weights_start_within_a_keras_embeddings_range(schema):
    for weight in EmbeddingTables(schema).parameters():
        assert 0 < weight.abs().max() <= 0.05


@pytest.mark.parametrize("sparse", [False, True])
def test_a_module_tells_ddp_which_gradients_are_sparse(schema, sparse):
    # DDP reads nn.Embedding.sparse before any gradient exists; a sparse one it does not expect ends the run.
    modules = [m for m in EmbeddingTables(schema, sparse=sparse).modules() if isinstance(m, torch.nn.Embedding)]
    assert [m.sparse for m in modules] == [sparse] * 2


@pytest.mark.parametrize("dim", [2, 3, 8, 10])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("lists", [[[4, 4, 0], [], [2], []], [[]], []])
def test_the_lookup_for_a_cpu_equals_torchs_own_kernels(lists, rows, sparse, dim):
    weight = torch.randn(6, dim)
    rows_BC = torch.tensor([[0, 5], [5, 1], [2, 2]])[:rows]
    values = torch.tensor([row for part in lists for row in part], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(part) for part in lists)]).cumsum(0)
    results = []
    for look_up in (by_bag, by_gather):
        leaf = weight.clone().requires_grad_()
        one_hot, bags = look_up(leaf, rows_BC, values, offsets, sparse=sparse)
        (one_hot.square().sum() + bags.square().sum()).backward()
        assert leaf.grad.is_sparse == sparse
        results.append((one_hot, bags, leaf.grad.to_dense()))
    assert results[1][1].shape == (len(lists), dim)
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want)


def test_rows_and_means_by_hand():
    weight = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    values, offsets = torch.tensor([1, 2, 0]), torch.tensor([0, 2, 2, 3])
    for look_up in (by_bag, by_gather):
        one_hot, bags = look_up(weight, torch.tensor([[2], [0]]), values, offsets, sparse=False)
        torch.testing.assert_close(one_hot, torch.tensor([[[4.0, 40.0]], [[1.0, 10.0]]]))
        torch.testing.assert_close(bags, torch.tensor([[3.0, 30.0], [0.0, 0.0], [1.0, 10.0]]))


def test_the_lookup_for_a_cpu_has_second_derivatives():
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    rows_BC, values, offsets = torch.tensor([[0, 5], [5, 1]]), torch.tensor([4, 4, 0, 2]), torch.tensor([0, 3, 3, 4])

    def squares(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(found.square() for found in by_gather(weight, rows_BC, values, offsets, sparse=False))

    assert torch.autograd.gradcheck(squares, weight)
    assert torch.autograd.gradgradcheck(squares, weight)


def test_the_gradient_of_a_single_row_may_begin_anywhere_in_memory():
    """With a batch of one row, embeddings concatenated after three dense features get gradients at an odd offset."""
    weight, joining = torch.randn(6, 8), torch.randn(27, 1)
    gradients = []
    for look_up in (by_bag, by_gather):
        leaf = weight.clone().requires_grad_()
        one_hot, bags = look_up(leaf, torch.tensor([[0, 5]]), torch.tensor([1]), torch.tensor([0, 1]), sparse=False)
        (torch.cat([torch.ones(1, 3), one_hot.view(1, 16), bags.view(1, 8)], dim=1) @ joining).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_tables_larger_than_the_machine_are_refused_by_name():
    small = CategoricalFeature(name="small", num_embeddings=5)
    huge = CategoricalFeature(name="user", hash_buckets=10**12, embedding_dim=64)
    schema = Schema(name="s", time_column="t", categorical=(small, huge), tasks=(Task(name="y"),))
    with pytest.raises(UserError, match=r"need 238,419 GiB, this machine has .*; the largest is that of 'user'"):
        EmbeddingTables(schema)
