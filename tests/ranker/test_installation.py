"""Where conf is and how a command is called, in a clone and in an environment that has the wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranker import installation
from support import ROOT


def test_in_a_clone_conf_is_the_top_level_folder_and_commands_are_scripts() -> None:
    assert installation.clone() == ROOT
    assert installation.conf_folder() == ROOT / "conf"
    assert installation.command_line("train") == "python train.py"
    assert installation.command_line("replay") == "python scripts/replay.py"
    assert all((ROOT / script).is_file() for script in installation.SCRIPTS.values())


@pytest.mark.parametrize("folder", ["lib/site-packages", "src"])
def test_elsewhere_conf_is_in_the_package_and_commands_are_those_of_evenkeel(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / folder / "ranker"
    monkeypatch.setattr(installation, "PACKAGE", package)

    assert installation.clone() is None
    assert installation.conf_folder() == package / "conf"
    assert installation.command_line("train") == "evenkeel train"
