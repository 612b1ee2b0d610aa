"""The authors' own implementation, step by step: parameters, accumulators and clipping factors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import optim

REFERENCE = Path(os.environ.get("EVENKEEL_REFERENCE", Path(__file__).parents[3] / "shared" / "reference"))
FILE = REFERENCE / "clippy_tfrs.json"
SETTINGS = [
    "defaults",
    "standard_update",
    "clip_accumulator",
    "accumulator_relative",
    "paper_lr1",
    "paper_lr1_clip_accumulator",
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

pytestmark = [
    pytest.mark.skipif(not FILE.exists(), reason=f"no reference vectors at {FILE}; set EVENKEEL_REFERENCE"),
    pytest.mark.filterwarnings("ignore:.*held still"),  # the authors' lambda_abs of 1e-7 does that to weights of 0
]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def our_names(theirs: dict[str, Any]) -> dict[str, Any]:
    return {
        "preset": "tfrs",
        "lr": theirs["learning_rate"],
        "lambda_rel": theirs["variable_relative_threshold"],
        "lambda_abs": theirs["absolute_threshold"],
        "lambda_acc": theirs["accumulator_relative_threshold"],
        "initial_accumulator_value": theirs["initial_accumulator_value"],
        "eps": theirs["epsilon"],
        "clip_accumulator": theirs["clip_accumulator_update"],
        "accumulator": "current" if theirs["use_standard_accumulator_update"] else "delayed",
    }


def assert_close(actual: torch.Tensor, expected: Any, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_dense_steps_equal_the_authors(
    reference: dict[str, Any], setting: str, dtype: torch.dtype, backend: str
) -> None:
    recorded = reference["settings"][setting]
    params = [torch.nn.Parameter(torch.tensor(value, dtype=dtype)) for value in reference["initial_params"]]
    optimizer = optim.build_optimizer(
        "clippy", params, collect_stats=True, backend=backend, **our_names(recorded["hyperparameters"])
    )
    for grads, step in zip(reference["grads"], recorded["steps"], strict=True):
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad, dtype=dtype)
        optimizer.step()
        sigmas = [row["sigma"] for row in optimizer.clip_stats().values()]
        assert_close(torch.tensor(sigmas, dtype=torch.float64), step["clipping_factors"], dtype)
        for param, value, total in zip(params, step["params"], step["accumulators"], strict=True):
            assert_close(param, value, dtype)
            assert_close(optimizer.state[param]["sum"], total, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_sparse_steps_with_duplicates_equal_the_authors(
    reference: dict[str, Any], setting: str, dtype: torch.dtype
) -> None:
    sparse = reference["sparse"]
    recorded = sparse["settings"][setting]
    table = torch.nn.Parameter(torch.tensor(sparse["initial_param"], dtype=dtype))
    optimizer = optim.build_optimizer("clippy", [table], collect_stats=True, **our_names(recorded["hyperparameters"]))
    for grad, step in zip(sparse["grads"], recorded["steps"], strict=True):
        values = torch.tensor(grad["values"], dtype=dtype)
        table.grad = torch.sparse_coo_tensor(
            torch.tensor([grad["indices"]]), values, table.shape, check_invariants=True
        )
        optimizer.step()
        (row,) = optimizer.clip_stats().values()
        assert_close(torch.tensor(row["sigma"], dtype=torch.float64), step["clipping_factor"], dtype)
        assert_close(table, step["param"], dtype)
        assert_close(optimizer.state[table]["sum"], step["accumulator"], dtype)
