"""Without torchrec: one line that says what to do, and nothing that is imported for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ranker.errors import UserError
from ranker.models.sharding import ShardingSettings, require
from support import TINY


def test_a_missing_or_broken_torchrec_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)

    with pytest.raises(UserError, match=r"needs torchrec and fbgemm-gpu for torch .* make setup-torchrec installs"):
        require()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("embeddings.plan=rowwise", "embeddings.plan 'rowwise' is unknown; did you mean 'row_wise'"),
        ("+embeddings.tables.nobody=row_wise", "no table 'nobody'"),
        ("embeddings.plan=row_wise", "needs torchrec and fbgemm-gpu"),
    ],
)
def test_a_missing_torchrec_hides_no_mistake_and_leaves_no_folder(
    word: str,
    said: str,
    command_line: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)

    with pytest.raises(SystemExit):
        command_line(*TINY, "embeddings=torchrec", word, f"hydra.run.dir={tmp_path / 'run'}")

    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plan": "rowwise"}, "embeddings.plan"),
        ({"tables": {"user": "data_parallel"}}, "embeddings.tables.user"),
        ({"optimizer": "adam"}, "embeddings.optimizer"),
        ({"init": "zeros"}, "embeddings.init"),
        ({"memory_gib": 0}, "embeddings.memory_gib must be above 0, got 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        ShardingSettings(**given)


def test_a_run_with_local_tables_imports_nothing_of_it() -> None:
    code = (
        "import sys, ranker.run\n"
        "found = {'torchrec', 'ranker.training.sharded_tables', 'ranker.models.sharding'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
