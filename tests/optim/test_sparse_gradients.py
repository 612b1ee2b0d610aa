"""Sparse gradients: touched rows only, duplicates summed once, one sigma a table or a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import optim

ROWS, WIDTH = 30, 4
METHODS = ["adagrad", "gc", "agc", "lamb", "clippy", "clippy_sgd"]


def sparse(indices: torch.Tensor, values: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    return torch.sparse_coo_tensor(indices[None], values, (rows, *values.shape[1:]), check_invariants=True)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def problem(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = request.param
    return (
        torch.randn(ROWS, WIDTH, dtype=dtype),
        torch.tensor([7, 3, 7, 21, 3, 7]),
        torch.randn(6, WIDTH, dtype=dtype),
    )


def one_step(name: str, weight: torch.Tensor, grad: torch.Tensor, **given: Any) -> tuple[torch.Tensor, Any]:
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad
    optimizer = optim.build_optimizer(name, [("table", parameter)], lr=0.5, collect_stats=True, **given)
    optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_touched_rows_step_as_the_dense_tensor_of_those_rows(problem: Any, name: str, backend: str) -> None:
    weight, indices, values = problem
    after, _ = one_step(name, weight, sparse(indices, values), backend=backend)
    touched = torch.tensor([3, 7, 21])
    summed = torch.zeros_like(weight).index_add_(0, indices, values)[touched]
    dense, _ = one_step(name, weight[touched], summed, backend=backend)
    torch.testing.assert_close(after[touched], dense)
    untouched = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, touched, False)
    assert after[untouched].equal(weight[untouched])


@pytest.mark.parametrize("name", METHODS[:-1])
def test_untouched_rows_of_the_accumulator_do_not_change(problem: Any, name: str) -> None:
    weight, indices, values = problem
    _, optimizer = one_step(name, weight, sparse(indices, values))
    (state,) = optimizer.state.values()
    untouched = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, indices, False)
    assert state["sum"][untouched].equal(torch.full((27, WIDTH), 0.1, dtype=weight.dtype))
    torch.testing.assert_close(state["sum"][21], 0.1 + values[3] ** 2)


@pytest.mark.parametrize("name", ["gc", "agc", "lamb", "clippy"])
def test_sigma_by_row_treats_every_row_as_a_tensor_of_its_own(problem: Any, name: str) -> None:
    weight, indices, values = problem
    after, _ = one_step(name, weight, sparse(indices, values), sparse_sigma="row")
    summed = torch.zeros_like(weight).index_add_(0, indices, values)
    for row in (3, 7, 21):
        alone, _ = one_step(name, weight[row], summed[row])
        torch.testing.assert_close(after[row], alone)


def test_the_report_names_the_coordinate_of_the_table_not_of_the_touched_rows(problem: Any) -> None:
    weight, indices, values = problem
    weight[21, 2] = 0.0
    values[3, 2] = 50.0
    _, optimizer = one_step("clippy", weight, sparse(indices, values))
    row = optimizer.clip_stats()["table"]
    assert row["coordinate"] == 21 * WIDTH + 2
    assert row["term"] == "absolute"


def test_a_gradient_that_touches_no_row_changes_nothing(problem: Any) -> None:
    weight, indices, values = problem
    for options in ({}, {"sparse_sigma": "row"}):
        after, _ = one_step("clippy", weight, sparse(indices[:0], values[:0]), **options)
        assert after.equal(weight)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own Adagrad sets this off
def test_adagrad_on_sparse_gradients_is_torchs(problem: Any) -> None:
    weight, indices, values = problem
    theirs = torch.nn.Parameter(weight.clone())
    theirs.grad = sparse(indices, values)
    torch.optim.Adagrad([theirs], lr=0.5, initial_accumulator_value=0.1).step()
    ours, _ = one_step("adagrad", weight, sparse(indices, values))
    torch.testing.assert_close(ours, theirs.detach())


def test_sparse_and_dense_tables_live_in_one_optimizer() -> None:
    tables = torch.nn.ModuleDict({"sparse": torch.nn.Embedding(9, 3, sparse=True), "dense": torch.nn.Embedding(9, 3)})
    optimizer = optim.build_optimizer("clippy", tables, lr=0.5, on_nonfinite="skip")
    before = {name: table.weight.detach().clone() for name, table in tables.items()}
    ids = torch.tensor([1, 1, 4])
    sum(table(ids).square().sum() for table in tables.values()).backward()
    optimizer.step()
    for name, table in tables.items():
        changed = (table.weight != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert changed == [1, 4], name


def test_weight_decay_of_a_sparse_table_is_refused(problem: Any) -> None:
    weight, indices, values = problem
    with pytest.raises(ValueError, match="weight_decay is not defined for sparse gradients"):
        one_step("clippy", weight, sparse(indices, values), weight_decay=0.1)


@pytest.mark.parametrize("row", [-1, ROWS])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_row_outside_of_the_table_is_refused_and_changes_nothing(row: int, backend: str) -> None:
    weight = torch.randn(ROWS, WIDTH)
    indices, values = torch.tensor([[3, row]]), torch.ones(2, WIDTH)
    grad = torch.sparse_coo_tensor(indices, values, (ROWS, WIDTH), check_invariants=False, is_coalesced=True)
    param = torch.nn.Parameter(weight.clone())
    param.grad = grad
    with pytest.raises(IndexError):
        optim.build_optimizer("clippy", [param], lr=0.5, backend=backend).step()
    assert param.equal(weight)


def test_a_sparse_step_counts_as_an_in_place_change_of_the_table_for_autograd() -> None:
    table = torch.nn.Parameter(torch.randn(ROWS, WIDTH))
    loss = (table * table).sum()
    table.grad = sparse(torch.tensor([1]), torch.ones(1, WIDTH))
    optim.build_optimizer("clippy", [table], lr=0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
