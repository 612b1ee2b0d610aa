"""Where the files of this installation are: in a clone, or in an environment into which the wheel was installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

# In a clone each command is also a script that needs no activated environment.
SCRIPTS = {
    "train": "train.py",
    "prepare": "scripts/prepare_data.py",
    "download": "scripts/download_data.py",
    "inspect": "scripts/inspect_data.py",
    "report": "scripts/report_run.py",
    "compare": "scripts/compare_runs.py",
    "plot": "scripts/plot_training.py",
    "daily": "scripts/daily.py",
    "replay": "scripts/replay.py",
    "export": "scripts/export.py",
    "score": "scripts/score.py",
    "headroom": "scripts/stability.py",
    "reproduce": "scripts/reproduce.py",
}


def clone() -> Path | None:
    """The clone from which this package is imported; None if it was installed from a wheel."""
    root = PACKAGE.parents[1]
    return root if PACKAGE.parent.name == "src" and (root / "conf" / "config.yaml").is_file() else None


def conf_folder() -> Path:
    """The folder with the configuration files: ``conf`` of the clone, or its copy inside the installed package."""
    root = clone()
    return PACKAGE / "conf" if root is None else root / "conf"


def command_line(command: str) -> str:
    """How a user starts a command here, such as ``python train.py`` in a clone and ``evenkeel train`` elsewhere."""
    return f"evenkeel {command}" if clone() is None else f"python {SCRIPTS[command]}"


def train_file() -> Path:
    """The file that trains when it is run, in a clone and in a wheel alike."""
    return PACKAGE / "commands" / "train.py"
