"""Rows that moved since some moment: each is found once, whether few of a table moved or many."""

from __future__ import annotations

import pytest
import torch

from ranker.training.touched_rows import TouchedRows


@pytest.mark.parametrize("count", [3, 3_000])  # few rows are collected, for many the marks are read
def test_rows_are_taken_once_and_then_forgotten(count: int) -> None:
    touched = TouchedRows({"table": torch.zeros(10_000, 1)})
    for seed in range(2):
        steps = torch.randint(10_000, (4, count), generator=torch.Generator().manual_seed(seed))
        for rows in steps:
            touched.note("table", rows.unique())
        taken = touched.taken("table")
        assert len(taken) == len(taken.unique())
        assert set(taken.tolist()) == set(steps.flatten().tolist())
        assert len(touched.taken("table")) == 0
