"""train.py on logs from files: one's own with a schema and no code, and the public data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ranker.data.schema import Schema
from support import TINY, TWO_RANKS, Finished, finished, train_process

DAY_MS = 86_400_000
SMALL = tuple(override for override in TINY if not override.startswith("data."))
SCHEMA = """
name: shop
time_column: ts
dense:
- {name: price, transform: log1p, fill_null: 0.0}
categorical:
- {name: user, column: user_id, hash_buckets: 100, embedding_dim: 4}
- {name: item, column: item_id, num_embeddings: 50, embedding_dim: 4}
- {name: country, vocabulary: [de, fr], embedding_dim: 4}
- {name: tags, kind: multi_hot, hash_buckets: 20, embedding_dim: 4}
- {name: history, kind: sequence, table: item, embedding_dim: 4, max_length: 3}
tasks:
- {name: click}
- {name: five_stars, column: rating, at_least: 5, mask: was_rated}
- {name: watch_time, type: regression, column: watch_ms, scale: 0.001, transform: log1p}
"""


@pytest.fixture(scope="module")
def own_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three days of a shop's log; the dearer an item, the more it is clicked."""
    root = tmp_path_factory.mktemp("shop")
    (root / "schema.yaml").write_text(SCHEMA)
    draw = np.random.default_rng(0)
    for day in range(3):
        rows = 1500
        item = draw.integers(0, 50, rows)
        pl.DataFrame(
            {
                "ts": 1_700_000_000_000 // DAY_MS * DAY_MS + day * DAY_MS + np.arange(rows) * 50_000,
                "price": item * draw.lognormal(0, 0.2, rows),
                "user_id": draw.integers(0, 2**60, rows),
                "item_id": item,
                "country": draw.choice(["de", "fr", "jp"], rows).tolist(),
                "tags": [draw.integers(0, 999, n).tolist() for n in draw.integers(0, 4, rows)],
                "history": [draw.integers(0, 50, n).tolist() for n in draw.integers(0, 6, rows)],
                "click": (draw.random(rows) < item / 50).astype(np.int8),
                "rating": draw.integers(1, 6, rows),
                "was_rated": draw.random(rows) < 0.5,
                "watch_ms": draw.lognormal(8, 1, rows),
            }
        ).write_parquet(root / f"day=2023-11-{14 + day}.parquet")
    return root


def test_a_log_of_ones_own_needs_a_schema_and_no_code(
    command_line: Callable[..., None], own_log: Path, tmp_path: Path
) -> None:
    command_line(
        *SMALL,
        "data=parquet",
        f"data.root={own_log}",
        "scale.batch_size=50",
        "data.window=500",
        f"hydra.run.dir={tmp_path}",
    )
    run = finished(tmp_path)

    assert run.summary["status"] == "completed"
    assert run.summary["examples"] == 3000
    assert run.summary["metrics"]["test/click/observed"] == 1500
    assert 600 < run.summary["metrics"]["test/five_stars/observed"] < 900
    assert run.summary["metrics"]["test/click/auc"] > 0.6  # its price tells


def copied(log: Path, to: Path) -> Path:
    to.mkdir()
    for path in log.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_rows_that_cannot_be_used_are_refused_or_left_out_and_counted(
    command_line: Callable[..., None], own_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copied(own_log, tmp_path / "log")
    first = copy / "day=2023-11-14.parquet"
    rows = pl.read_parquet(first).with_columns(
        price=pl.when(pl.int_range(pl.len()) < 7).then(float("inf")).otherwise("price")
    )
    rows.write_parquet(first)
    train = (*SMALL, "data=parquet", f"data.root={copy}", "scale.batch_size=50", "train.eval_every=0")

    with pytest.raises(SystemExit):
        command_line(*train, f"hydra.run.dir={tmp_path / 'refused'}")
    assert "'price'" in capsys.readouterr().err
    for policy in ("drop", "quarantine"):
        command_line(*train, f"data.on_bad_rows={policy}", "data.tasks=click", f"hydra.run.dir={tmp_path / policy}")
        assert finished(tmp_path / policy).summary["bad_rows"] == 7
        assert "7 rows could not be used and were left out" in capsys.readouterr().out
    assert sum(len(pl.read_parquet(path)) for path in (copy / "quarantine").rglob("*.parquet")) == 7


def test_a_hold_out_without_positives_has_no_auc_and_says_so(
    command_line: Callable[..., None], own_log: Path, tmp_path: Path
) -> None:
    copy = copied(own_log, tmp_path / "log")
    last = copy / "day=2023-11-16.parquet"
    pl.read_parquet(last).with_columns(click=pl.lit(0, pl.Int8)).write_parquet(last)

    command_line(
        *SMALL, "data=parquet", f"data.root={copy}", "scale.batch_size=50", f"hydra.run.dir={tmp_path / 'run'}"
    )

    run = finished(tmp_path / "run")
    assert run.summary["status"] == "completed"
    assert run.summary["metrics"]["test/click/auc"] is None
    assert run.summary["metrics"]["test/click/observed"] == 1500
    assert run.summary["metrics"]["test/five_stars/auc"] > 0
    assert "test/click/auc is undefined: all 1500 observed labels are 0" in (run.folder / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bad_rows_of_the_hold_out_are_counted_whichever_rank_reads_them(own_log: Path, tmp_path: Path) -> None:
    copy = copied(own_log, tmp_path / "log")
    last = copy / "day=2023-11-16.parquet"
    bad = (3, 30, 757, 1480)  # of the 1,500 rows rank 0 reads the first half and rank 1 the other
    rows = pl.read_parquet(last).with_columns(
        price=pl.when(pl.int_range(pl.len()).is_in(bad)).then(float("inf")).otherwise("price")
    )
    rows.write_parquet(last, row_group_size=25)

    process = train_process(
        *SMALL,
        "data=parquet",
        f"data.root={copy}",
        "data.on_bad_rows=drop",
        "scale.batch_size=50",
        *TWO_RANKS,
        "train.eval_every=0",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors

    assert finished(tmp_path / "run").summary["bad_rows"] == len(bad)


def test_a_schema_that_does_not_fit_the_files_is_refused(
    command_line: Callable[..., None], own_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copied(own_log, tmp_path / "log")
    (copy / "schema.yaml").write_text(SCHEMA.replace("column: watch_ms", "column: watch_s"))

    with pytest.raises(SystemExit):
        command_line(*SMALL, "data=parquet", f"data.root={copy}", f"hydra.run.dir={tmp_path / 'run'}")

    error = capsys.readouterr().err
    assert "'watch_s'" in error
    assert "watch_ms" in error
    assert "day=2023-11-14.parquet" in error


def test_movielens_trains_from_its_published_files(command_line: Callable[..., None], tmp_path: Path) -> None:
    source = tmp_path / "ml-1m"
    source.mkdir()
    draw = np.random.default_rng(0)
    (source / "users.dat").write_text("".join(f"{u}::{'MF'[u % 2]}::25::{u % 20}::12345\n" for u in range(1, 41)))
    (source / "movies.dat").write_text("".join(f"{m}::Movie {m} (1999)::Drama|Comedy\n" for m in range(1, 61)))
    ratings = sorted(
        (978_300_000 + int(t), int(u), int(m)) for t, u, m in draw.integers([0, 1, 1], [9_000_000, 41, 61], (3000, 3))
    )
    (source / "ratings.dat").write_text("".join(f"{u}::{m}::{1 + m % 5}::{t}\n" for t, u, m in ratings))

    command_line(
        *SMALL,
        "data=movielens",
        f"data.source={source}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.eval_days=20",
        "scale.batch_size=128",
        f"hydra.run.dir={tmp_path / 'run'}",
    )

    run = finished(tmp_path / "run")
    assert {key.split("/")[1] for key in run.summary["metrics"]} == {"like", "five_stars", "rating"}


def test_the_kuairand_slice_trains_and_learns(
    command_line: Callable[..., None], kuairand_source: Path, tmp_path: Path
) -> None:
    command_line(
        "data=kuairand",
        f"data.source={kuairand_source}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "trainer=cpu",
        "logger=csv",
        "train.eval_every=0",
        "train.threads=1",
        "scale.batch_size=512",
        f"hydra.run.dir={tmp_path / 'run'}",
    )

    run: Finished = finished(tmp_path / "run")
    assert run.summary["status"] == "completed"
    assert run.summary["metrics"]["test/is_click/auc"] > 0.64
    assert len({key.split("/")[1] for key in run.summary["metrics"]}) == 7


def test_a_naive_optimizer_is_lost_on_the_kuairand_slice(
    command_line: Callable[..., None], kuairand_source: Path, tmp_path: Path
) -> None:
    command_line(
        "data=kuairand",
        f"data.source={kuairand_source}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "optim=adagrad",
        "lr_mult=8",
        "trainer=cpu",
        "logger=csv",
        "train.eval_every=0",
        "train.threads=1",
        f"hydra.run.dir={tmp_path / 'run'}",
    )

    assert finished(tmp_path / "run").summary["status"] == "diverged"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_warn_once_and_keep_the_schema_once_and_refuse_another_one_at_once(
    own_log: Path, tmp_path: Path
) -> None:
    copy = copied(own_log, tmp_path / "log")
    leaking = SCHEMA.replace("categorical:", "- {name: stars, column: rating}\ncategorical:")
    (copy / "schema.yaml").write_text(leaking)
    settings = (*SMALL, "data=parquet", f"data.root={copy}", "scale.batch_size=50", *TWO_RANKS, "train.eval_every=0")
    folder = tmp_path / "run"

    process = train_process(*settings, "train.max_steps=4", f"hydra.run.dir={folder}")
    output, errors = process.communicate(timeout=250)

    assert process.returncode == 0, errors
    assert (output + errors).count("column 'rating' is the label of task 'five_stars' and feature 'stars'") == 1
    assert (output + errors).count("steps to come") == 1
    assert (output + errors).count("run folder:") == 1
    assert finished(folder).summary["world_size"] == 2
    kept = (folder / "schema.yaml").read_text()
    assert Schema.from_text(kept) == Schema.from_text(leaking)
    assert [path.name for path in folder.rglob("schema.yaml")] == ["schema.yaml"]

    (copy / "schema.yaml").write_text(SCHEMA)
    process = train_process(f"resume={folder}", "train.max_steps=-1")
    output, errors = process.communicate(timeout=250)

    assert process.returncode == 2, errors
    assert errors.count("the schema beside the data is not the one of the run") == 1
    assert (folder / "schema.yaml").read_text() == kept
    assert finished(folder).summary["steps"] == 4
