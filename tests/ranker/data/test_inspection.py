from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from ranker.data.inspection import broken_checksums, inspect_log, leak_suspects
from ranker.data.manifest import FileEntry, Manifest
from ranker.data.parquet_log import ParquetLog
from ranker.data.schema import CategoricalFeature, DenseFeature

DAYS = {0: 40, 1: 40, 2: 40}


def found(root, **options):
    return inspect_log(ParquetLog(str(root), on_bad_rows="drop", **options))


def test_a_clean_log_gives_its_files_and_no_warning(write_log):
    findings = found(write_log(DAYS))
    assert findings.warnings == ()
    assert [(entry.path[4:14], entry.rows) for entry in findings.files] == [
        ("2022-04-25", 40),
        ("2022-04-26", 40),
        ("2022-04-27", 40),
    ]
    assert findings.files[0].label_rates["click"] == 0.5
    assert findings.files[0].time_min_ms == 1_650_844_800_000


def test_labels_that_vanish_are_named_with_their_day(write_log):
    def change(day, columns):
        click = np.arange(40) % 2
        columns["click"] = pa.array([[1] * 40, [0] * 40, click, [0] * 39 + [1], click, click][day], pa.int8())
        if day == 4:
            columns["click"] = pa.array([None] * 40, pa.int8())

    warnings = found(write_log(dict.fromkeys(range(6), 40), change=change)).warnings
    assert warnings == (
        "day=2022-04-29.parquet: task 'click' has no observed label",
        "day=2022-04-25.parquet: task 'click' has no negative label, so its AUC is undefined there",
        "day=2022-04-26.parquet: task 'click' has no positive label, so its AUC is undefined there",
        "day=2022-04-28.parquet: task 'click' has 2.50% positives where 50.00% is usual",
    )


def test_a_day_without_rows_is_named(write_log):
    assert found(write_log({0: 40, 1: 40, 3: 0, 4: 40})).warnings == ("no rows on 2022-04-27", "no rows on 2022-04-28")


def test_duplicate_and_bad_rows_are_counted(write_log):
    def change(day, columns):
        if day == 1:
            for name, column in columns.items():
                columns[name] = column.take(pa.array([0, 1, 1, *range(3, 40)]))
            columns["slot"] = pa.array([99, *columns["slot"].to_pylist()[1:]], pa.int16())

    findings = found(write_log(DAYS, change=change))
    assert (findings.duplicates, findings.bad) == (1, 1)
    assert len(findings.warnings) == 2
    assert "the first in day=2022-04-26.parquet, row group 0: are they" in findings.warnings[0]


def test_a_feature_that_knows_the_label_is_suspected(array_log):
    log = array_log(4000)
    batch = log.read(0, 4000)
    label = batch.labels_BT[:, 0]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4000, generator=generator)
    random_ids = torch.randint(0, 50, (4000,), generator=generator)
    batch = dataclasses.replace(
        batch,
        dense_BF=torch.stack([noise, -label + 0.1 * noise], 1),
        onehot_BC=torch.stack([random_ids, random_ids * 2 + label.long()], 1),
    )
    schema = dataclasses.replace(
        log.schema,
        dense=(DenseFeature(name="noise"), DenseFeature(name="late")),
        categorical=(
            CategoricalFeature(name="random", num_embeddings=100),
            CategoricalFeature(name="telling", num_embeddings=100),
        ),
    )
    suspects = list(leak_suspects([batch], schema))
    assert [suspect.split("'")[1] for suspect in suspects] == ["late", "telling"]


def test_a_file_that_changed_after_the_manifest_is_named(write_log):
    root = write_log(DAYS)
    names = sorted(path.name for path in root.glob("*.parquet"))
    manifest = Manifest(files=tuple(FileEntry(path=name, rows=40, sha256="0" * 64) for name in names[:1]))
    assert list(broken_checksums(root, manifest)) == [
        "day=2022-04-25.parquet: the file changed after the manifest was written; prepare the data again"
    ]


@pytest.fixture
def inspect_data(load_script):
    return load_script("inspect_data").main


def test_the_script_prints_files_and_warnings(write_log, inspect_data, capsys):
    root = write_log(DAYS, manifest=True)
    assert inspect_data([str(root)]) == 0
    shown = capsys.readouterr().out
    assert "120 rows, of which 0 cannot be used" in shown
    assert "day=2022-04-26.parquet" in shown
    assert "click 0.5" in shown
    assert shown.endswith("nothing looks wrong\n")
    assert inspect_data([str(root), "--quick"]) == 0
    assert "manifest.json: 120 rows" in capsys.readouterr().out


def test_the_script_refuses_a_broken_log_with_one_line(write_log, inspect_data, capsys):
    root = write_log(DAYS)
    (root / "day=2022-04-26.parquet").write_bytes(b"")
    assert inspect_data([str(root)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_the_script_lists_constant_columns_among_its_warnings(write_log, inspect_data, capsys):
    def change(day, columns):
        columns["price"] = pa.array([2.5] * 40)

    root = write_log(DAYS, change=change)
    for arguments in ([], ["--quick"]):
        assert inspect_data([str(root), *arguments]) == 0
        shown = capsys.readouterr().out
        assert "names columns from which nothing can be learned: 'price' (always 2.5)" in shown
        assert "nothing looks wrong" not in shown


def test_files_that_overlap_are_shown_with_what_the_manifest_says(write_log, inspect_data, capsys):
    hour, day = 3_600_000, 86_400_000

    def change(number, columns):
        if number == 1:
            columns["t"] = pa.array(columns["t"].to_numpy() + hour)

    root = write_log(DAYS, change=change)
    start = 1_650_844_800_000
    entries = [
        FileEntry(
            path=f"day=2022-04-{25 + k}.parquet",
            rows=40,
            time_min_ms=start + k * day,
            time_max_ms=start + (k + 1) * day + (hour if k == 1 else -hour),
        )
        for k in range(3)
    ]
    Manifest(files=tuple(entries)).write(root)
    assert inspect_data([str(root)]) == 2
    shown = capsys.readouterr()
    assert "manifest.json: 120 rows" in shown.out
    assert "warning: day=2022-04-27.parquet begins before day=2022-04-26.parquet ends" in shown.out
    assert shown.err.startswith("error: day=2022-04-27.parquet, column 't', row group 0: begins before")


def test_what_opening_a_log_warns_about_is_a_warning_here_too(write_log, inspect_data, capsys, caplog):
    root = write_log(DAYS)
    (root / "_late.parquet").write_text("")
    assert inspect_data([str(root), "--quick"]) == 0
    assert "passed over _late.parquet; only *.parquet files are read" in capsys.readouterr().out
    assert not caplog.records


def test_integers_that_float32_does_not_hold_are_named(write_log, log_schema, inspect_data, capsys):
    def change(number, columns):
        columns["price"] = pa.array(range(2**24 - 39 + 40 * (number == 1), 2**24 + 1 + 40 * (number == 1)))

    root = write_log(DAYS, change=change)
    assert inspect_data([str(root), "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "day=2022-04-26.parquet: dense feature 'price' holds integers up to 16,777,256" in shown
    assert shown.count("holds integers up to") == 1


def test_a_label_that_is_a_feature_is_named(write_log, log_schema, inspect_data, capsys):
    features = (*log_schema.dense, DenseFeature(name="seconds", column="watch"))
    root = write_log(DAYS, schema=dataclasses.replace(log_schema, dense=features))
    assert inspect_data([str(root), "--quick"]) == 0
    assert "column 'watch' is the label of task 'watch' and feature 'seconds'" in capsys.readouterr().out
