"""A small log by day, whose labels depend on its features, for tests of warm starts and of daily training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

DAY_MS = 86_400_000
FIRST_DAY = 19_675  # days since 1970: 2023-11-14
ROWS = 600
SCHEMA = """
name: own
time_column: ts
dense:
- {name: price}
- {name: age, transform: log1p}
categorical:
- {name: user, num_embeddings: 100, embedding_dim: 4}
- {name: shop, vocabulary: [a, b, c], embedding_dim: 4}
tasks:
- {name: click}
- {name: watch, type: regression, transform: log1p}
"""
# Windows end with days, so that a run of one day has the windows that a run of all days would have.
SETTINGS = (
    "data=parquet",
    "logger=csv",
    "trainer=cpu",
    "train.threads=1",
    "train.log_every=5",
    "train.checkpoint_every=4",
    "train.eval_every=0",
    "train.warmup_steps=0",
    "scale.batch_size=64",
    "data.window=12h",
    "data.num_workers=0",
    "data.base_lr.laptop=0.1",
    "++model.widths.small.laptop=[8,8]",
)


def name_of(day: int) -> str:
    return str(np.datetime64(FIRST_DAY + day, "D"))


def rows_of(day: int, rows: int = ROWS) -> pl.DataFrame:
    draw = np.random.default_rng(day)
    price, user = draw.random(rows), draw.integers(0, 100, rows)
    return pl.DataFrame(
        {
            "ts": (FIRST_DAY + day) * DAY_MS + np.arange(rows) * (DAY_MS // rows),
            "price": price,
            "age": draw.lognormal(3, 1, rows),
            "user": user,
            "shop": draw.choice(["a", "b", "c"], rows),
            "click": (draw.random(rows) < 0.1 + 0.6 * price + 0.2 * (user % 2)).astype(np.int8),
            "watch": draw.lognormal(price, 0.5),
        }
    )


def write_day(
    root: Path, day: int, change: Callable[[pl.DataFrame], pl.DataFrame] = lambda rows: rows, *, name: str = ""
) -> Path:
    path = root / (name or f"day={name_of(day)}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    change(rows_of(day)).write_parquet(hidden)
    hidden.rename(path)  # as a pipeline should: a reader never sees half a file
    return path


def write_log(root: Path, days: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "schema.yaml").write_text(SCHEMA)
    for day in range(days):
        write_day(root, day)
    return root


def words_for(folder: Path) -> list[str]:
    """Arguments of scripts/daily.py for the log in folder/log; its gate may find a model a little worse."""
    return [*SETTINGS, f"data.source={folder / 'log'}", f"daily.dir={folder / 'daily'}", "daily.max_auc_drop=1"]


def pass_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows teach little, and an export takes seconds: the gate passes everything, and no program is traced."""
    import ranker.daily.judge as judge
    from ranker.export.bundle import new_folder
    from ranker.runs.model_card import write_card
    from ranker.stability.gate import Verdict

    def quick(
        candidate: Any, evidence: Any, settings: Any, *, destination: Path, about: Any, card: Any, **_: Any
    ) -> Verdict:
        with new_folder(destination, replace=True) as draft:
            (draft / "export.json").write_text(json.dumps({"run": about["run"], "step": about["step"]}))
            write_card(draft, card)
        return Verdict(())

    monkeypatch.setattr(judge, "judge", lambda *_: Verdict(()))
    monkeypatch.setattr(judge, "write_export", quick)
