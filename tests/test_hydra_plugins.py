"""The Hydra plugins cost other people's Hydra apps nothing: no import, no registered configuration, no output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support import ROOT

# Another project's app. Hydra imports all of hydra_plugins when it starts.
APP = """
import json, sys
from pathlib import Path
import hydra
from hydra.core.global_hydra import GlobalHydra

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    loaded = [name for name in ("ranker", "optim", "torch", "polars", "pytorch_lightning") if name in sys.modules]
    sweepers = GlobalHydra.instance().config_loader().get_group_options("hydra/sweeper")
    seen = {"plugin": "hydra_plugins.evenkeel_sweepers" in sys.modules, "loaded": loaded, "sweepers": sweepers}
    Path(sys.argv[0]).with_suffix(".json").write_text(json.dumps(seen))

main()
"""
ADDED = """
import sys
import hydra.core.plugins, hydra._internal.core_plugins.basic_sweeper
before = set(sys.modules)
import hydra_plugins.evenkeel_sweepers
print(*sorted(set(sys.modules) - before))
"""


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )


def test_another_projects_app_loads_and_registers_nothing_of_ours(tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text(APP)

    done = python("app.py", folder=tmp_path)

    seen = json.loads((tmp_path / "app.json").read_text())
    assert seen["plugin"], "Hydra found the plugins"
    assert seen["loaded"] == []
    assert "basic" in seen["sweepers"]
    assert not {"list", "headroom"} & set(seen["sweepers"])
    assert done.stdout == done.stderr == ""


def test_the_plugins_import_nothing_that_hydra_has_not_imported(tmp_path: Path) -> None:
    done = python("-c", ADDED, folder=tmp_path)

    assert done.stdout.split() == ["hydra_plugins", "hydra_plugins.evenkeel_sweepers"]
    assert done.stderr == ""
