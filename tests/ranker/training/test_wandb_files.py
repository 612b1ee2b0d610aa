"""W&B's own files can be read: if an upgrade of wandb changes their format, these tests say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import wandb

from ranker.training.wandb_files import BLOCK, GLOBAL_STEP, files_of, records, row_of, sent_before
from tracked import finished_records

CHANGED = f"wandb {wandb.__version__} has changed its files: adapt ranker/training/wandb_files.py"


def attempt(folder: Path, rows: list[dict[str, object]], **options: object) -> None:
    """Tracks rows offline. Two attempts of one run in the same second would share a folder, so the name is changed."""
    run = wandb.init(
        project="p", id="abc", dir=str(folder), mode="offline", settings=wandb.Settings(quiet=True), **options
    )
    path = Path(run.dir).parent
    for row in rows:
        run.log(row)
    run.alert("lost", "the loss rose", level="ERROR")
    run.finish()
    finished_records(path / "run-abc.wandb")
    number = len(files_of(folder, "abc"))
    path.rename(path.with_name(f"offline-run-20260101_00000{number}-abc"))


def test_what_was_logged_is_read_back_also_from_a_file_that_was_cut_off(tmp_path: Path) -> None:
    long = "x" * (3 * BLOCK)  # a record over several blocks
    attempt(
        tmp_path,
        [{GLOBAL_STEP: 1, "a.b/loss": 0.5}, {GLOBAL_STEP: 2, "note": long}, {GLOBAL_STEP: 3, "a.b/loss": 0.25}],
    )

    (path,) = files_of(tmp_path, "abc")
    found = list(records(path))
    kinds = [record.WhichOneof("record_type") for record in found]
    assert kinds[0] == "header", CHANGED
    assert {"run", "alert", "exit"} < set(kinds), CHANGED
    rows = [row_of(record) for record in found if record.WhichOneof("record_type") == "history"]
    assert [json.loads(row[GLOBAL_STEP]) for row in rows] == [1, 2, 3]
    assert [json.loads(row["_step"]) for row in rows] == [0, 1, 2]
    assert json.loads(rows[1]["note"]) == long
    assert json.loads(rows[2]["a.b/loss"]) == 0.25

    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert 0 < len(list(records(path))) < len(found)
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    assert 0 < len(list(records(path))) < len(found), "a record with another checksum is no record"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="does not begin as a file of W&B does"):
        list(records(path))


def test_what_came_after_a_checkpoint_is_known_over_all_attempts(tmp_path: Path) -> None:
    attempt(tmp_path, [{GLOBAL_STEP: n, "loss": 1.0, "val/click/auc": 0.1 * n} for n in range(1, 6)])
    attempt(tmp_path, [{GLOBAL_STEP: 6, "loss": 1.0}, {GLOBAL_STEP: 2, "event": 1.0}])

    def sent(step: int, known_rows: int | None = None):
        return sent_before(
            tmp_path, "abc", step=step, known_rows=known_rows, wanted=lambda name: name.startswith("val/")
        )

    names = {name for _, name in sent(3).values}
    assert {"loss", "event", "val/click/auc"} <= names
    assert (3, "loss") in sent(3).values, "the checkpoint's own step: a window is scored after it"
    assert (2, "loss") not in sent(3).values
    assert (2, "event") in sent(3).values, "an event is recorded when it is judged"
    assert (sent(3).last_step, sent(3).rows) == (6, 5)
    assert sent(3).extremes["val/click/auc"] == pytest.approx((0.1, 0.3))
    assert sent(3).alerts == {("lost", "the loss rose")}
    assert sent(3, known_rows=4).last_step == 6
    assert (5, "loss") not in sent(3, known_rows=4).values, "a row that the server does not have is sent again"
    assert not sent(9).values


def test_a_rewind_takes_back_what_was_sent(tmp_path: Path) -> None:
    attempt(tmp_path, [{GLOBAL_STEP: n, "loss": 1.0} for n in range(1, 6)])
    attempt(tmp_path, [{GLOBAL_STEP: 4, "loss": 2.0}], resume_from="abc?_step=2")

    found = sent_before(tmp_path, "abc", step=3, known_rows=None, wanted=lambda name: False)

    assert {step for step, _ in found.values} == {3, 4}
    assert found.rows == 4
