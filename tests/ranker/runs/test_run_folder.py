from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ranker.errors import UserError
from ranker.runs.run_folder import RunFolder, versions, whole_lines


def test_the_saved_configuration_is_resolved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.save_config(OmegaConf.create({"width": 64, "hidden": ["${width}", "${width}"]}))

    assert folder.load_config().hidden == [64, 64]
    assert "${" not in (folder.path / "config.yaml").read_text()


def test_a_summary_with_nan_is_still_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_summary({"metrics": {"a/auc": math.nan, "b/auc": 0.7}, "list": [math.inf]})

    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "metrics": {"a/auc": None, "b/auc": 0.7},
        "list": [None],
    }


def test_events_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (5, 15, 25):
        folder.append_event({"kind": "micro", "step": step})
    folder.keep_events_until(15)

    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 15]


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunFolder.existing(tmp_path)


def test_versions_name_what_decides_the_numbers() -> None:
    assert versions()["torch"].startswith("2.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_an_event_that_cannot_be_written_is_one_line_that_says_how_to_go_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "events.jsonl").symlink_to("/dev/full")

    with pytest.raises(UserError, match=r"events.jsonl cannot be written: No space left.*resume="):
        folder.append_event({"step": 1})


def test_half_an_event_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.append_event({"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "events.jsonl").stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            folder.append_event({"step": 2, "reason": "long enough"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)

    assert (tmp_path / "events.jsonl").read_text() == '{"step": 1}\n'


def test_a_last_line_that_was_cut_off_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')

    assert whole_lines(path) == b'{"step": 1}\n{"step": 2}\n'
    RunFolder(tmp_path).keep_events_until(5)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"st')
    assert whole_lines(path) == b""
