"""Files of somebody else, given to the commands: nothing in them runs, and no secret is read into them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from support import TINY

SHORT = ("train.max_steps=8", "train.checkpoint_every=4")


@pytest.fixture(scope="module")
def trained(command_line: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    command_line(*TINY, *SHORT, f"hydra.run.dir={folder}")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be changed by an attacker."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def change(run: Path, key: str, value: Any) -> None:
    cfg = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    OmegaConf.save(cfg, run / "config.yaml")


def test_resume_runs_nothing_that_the_folder_names(
    run: Path, command_line: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, "callbacks.x", {"_target_": "os.mkdir", "path": str(tmp_path / "owned")})

    with pytest.raises(SystemExit) as stopped:
        command_line(f"resume={run}", "train.max_steps=12")

    assert stopped.value.code == 2
    assert "callbacks.x names 'os.mkdir'" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_resume_runs_what_the_user_trusts(run: Path, command_line: Callable[..., None], tmp_path: Path) -> None:
    change(run, "logger.x", {"_target_": "os.mkdir", "path": str(tmp_path / "owned")})

    with pytest.raises(SystemExit):  # os.mkdir gives no logger
        command_line(f"resume={run}", "train.max_steps=12", "trust=[os.mkdir]")

    assert (tmp_path / "owned").exists()


def test_a_trusted_name_of_the_folder_itself_counts_for_nothing(
    run: Path, command_line: Callable[..., None], tmp_path: Path
) -> None:
    change(run, "callbacks.x", {"_target_": "os.mkdir", "path": str(tmp_path / "owned")})
    change(run, "trust", ["os.mkdir"])

    with pytest.raises(SystemExit):
        command_line(f"resume={run}", "train.max_steps=12")

    assert not (tmp_path / "owned").exists()


def test_resume_reads_no_secret_of_the_environment(
    run: Path, command_line: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("tags: []", "tags: ['${oc.env:SECRET}']"))

    with pytest.raises(SystemExit) as stopped:
        command_line(f"resume={run}", "train.max_steps=12")

    assert stopped.value.code == 2
    assert "tags[0] holds '${'" in capsys.readouterr().err
    assert not [path for path in run.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


def test_a_name_in_the_folder_leads_hydra_to_no_file_outside_the_configuration(
    run: Path, command_line: Callable[..., None], tmp_path: Path
) -> None:
    """The names of the groups choose files of the user's configuration."""
    from ranker.config_overrides import resumed_words
    from ranker.installation import conf_folder

    (tmp_path / "evil.yaml").write_text("# @package _global_\nhydra: {callbacks: {x: {_target_: os.mkdir}}}\n")
    name = os.path.relpath(tmp_path / "evil", conf_folder() / "model")
    assert (conf_folder() / "model" / f"{name}.yaml").is_file()
    change(run, "model.name", name)

    assert not [word for word in resumed_words([f"resume={run}"], conf=conf_folder()) if word.startswith("model=")]


def test_export_runs_nothing_that_the_folder_names(
    run: Path, load_script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, "data.log", {"_target_": "os.mkdir", "path": str(tmp_path / "owned")})

    assert load_script("export").main([str(run), "--out", str(tmp_path / "out")]) == 2

    assert "data.log names 'os.mkdir'" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()
    with pytest.raises(AttributeError):  # os.mkdir gives no log
        load_script("export").main([str(run), "--out", str(tmp_path / "out"), "--trust", "os.mkdir"])
    assert (tmp_path / "owned").exists()
