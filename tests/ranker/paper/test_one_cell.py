"""A published cell of table 2 is reproduced by training again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from ranker.paper.jobs import BARE
from ranker.paper.search import point_of
from ranker.paper.store import read_runs
from support import ROOT, finished


@pytest.mark.slow
def test_a_cell_of_table_2_comes_out_again(
    command_line: Callable[..., None], kuairand_source: Path, tmp_path: Path
) -> None:
    runs = read_runs(ROOT / "results" / "kuairand_laptop" / "table2_final.csv")
    cell = runs.filter(pl.col("model") == "large_dcn", pl.col("method") == "gc")
    axes = point_of(cell.row(0, named=True)).axes("large_dcn", "gc")
    command_line(
        "data=kuairand",
        f"data.source={kuairand_source}",
        f"data.cache_dir={tmp_path / 'cache'}",
        *BARE,
        *(f"{key}={value}" for key, (value,) in axes.items()),
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    auc = finished(tmp_path / "run").summary["metrics"]["test/is_click/auc"]
    published = cell["is_click/auc"]
    assert len(published) >= 3
    assert abs(auc - published.mean()) <= 3 * published.std()  # type: ignore[operator]
