from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ranker.commands.data_commands import prepare
from ranker.data.manifest import Manifest
from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import steps
from ranker.data.prepare.generated import write_generated
from ranker.data.synthetic import BLOCK, SyntheticLog
from ranker.data.synthetic_world import Difficulty
from ranker.errors import UserError

WORLD = ["num_users=50", "num_items=40", "train_rows=9000", "eval_rows=500", "rows_per_day=4000", "signals=3"]


@pytest.mark.parametrize("first_day", [0, 1])  # the second begins inside a block
def test_the_files_hold_the_rows_of_the_generated_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first_day: int
) -> None:
    words = [f"data.log.{word}" for word in [*WORLD, f"first_day={first_day}"]]
    assert prepare(["synthetic", str(tmp_path / "log"), "--quiet", "--set", *words]) == 0
    assert "9,500 rows in 4 days; the last is the hold-out, with data.log.eval_rows=500\n" in capsys.readouterr().out

    numbers = {name: int(value) for name, value in (word.split("=") for word in [*WORLD, f"first_day={first_day}"])}
    made = SyntheticLog(**numbers, embedding_dim=8, difficulty=Difficulty(jump=10.0, quiet_days=3.0))  # as in conf
    read = ParquetLog(str(tmp_path / "log"), eval_days=1)
    assert (read.train_rows, read.num_rows) == (9000, 9500)
    for start, stop in ((0, 300), (BLOCK - 5, BLOCK + 5), (8990, 9500)):
        ours, theirs = read.read(start, stop), made.read(start, stop)
        assert torch.equal(ours.time_ms_B, theirs.time_ms_B)
        torch.testing.assert_close(ours.dense_BF, theirs.dense_BF, rtol=1e-5, atol=0)  # log1p of strided rows
        assert torch.equal(ours.mask_BT, theirs.mask_BT)
        torch.testing.assert_close(ours.labels_BT, theirs.labels_BT, rtol=1e-5, atol=0)
        hashed = [i for i, feature in enumerate(made.schema.one_hot) if made.schema.table_of(feature).hash_buckets]
        plain = [i for i in range(ours.onehot_BC.shape[1]) if i not in hashed]
        assert torch.equal(ours.onehot_BC[:, plain], theirs.onehot_BC[:, plain])
        assert torch.equal(ours.ragged["tags"].values, theirs.ragged["tags"].values)
        assert torch.equal(ours.ragged["history"].offsets, theirs.ragged["history"].offsets)
    manifest = Manifest.read(tmp_path / "log")
    assert manifest is not None
    assert [entry.rows for entry in manifest.files] == [4000, 4000, 1000, 500]
    assert manifest.source["settings"] == words


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["synthetic", "SRC", "{new}"], "takes DST alone"),
        (["kuairand", "{new}"], "take SRC and DST"),
        (["kuairand", "SRC", "{new}", "--set", "data.log.seed=1"], "--set belongs to synthetic"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare([word.format(new=tmp_path / "new") for word in words])
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("seed=1", "data.log.NAME=VALUE"),
        ("data.log.rows=5", "rows"),
        ("data.log.train_rows=0", "train_rows must be at least 1"),
        ("data.log.row_weights=1", "row_weights"),
    ],
)
def test_an_option_that_the_log_has_not_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, problem: str
) -> None:
    assert prepare(["synthetic", str(tmp_path / "new"), "--quiet", "--set", word]) == 2
    said = capsys.readouterr().err.strip()
    assert problem in said
    assert said.count("\n") == 0
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with steps(visible=False) as step, pytest.raises(UserError, match="not empty"):
        write_generated(SyntheticLog(num_users=5, num_items=20), tmp_path, step=step)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
