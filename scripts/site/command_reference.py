"""The help of every command as Markdown: what ``evenkeel NAME --help`` prints."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from unittest import mock

from ranker.commands import console

INTRO = """# Every command

`evenkeel NAME` and the file in `scripts/` beside it are the same command. `evenkeel train` is `python train.py`:
it takes [options](options.md) as `KEY=VALUE`. A mistake is answered in one line, with exit status 2.

"""
FILES = {
    "train": "train.py",
    "headroom": "scripts/stability.py",
    "prepare": "scripts/prepare_data.py",
    "download": "scripts/download_data.py",
    "inspect": "scripts/inspect_data.py",
    "report": "scripts/report_run.py",
    "compare": "scripts/compare_runs.py",
    "wandb-report": "scripts/wandb_report.py",
    "plot": "scripts/plot_training.py",
}  # the others are scripts/NAME.py, with _ for -


def markdown() -> str:
    """The whole page."""
    parts = [INTRO]
    for name, (_, _, description) in console.COMMANDS.items():
        parts.append(f"## {name} {{ #{name} }}\n\n`{file_of(name)}`: {description}\n\n")
        if name != "train":  # Hydra's help is the reference of options
            parts.append(f"```text\n{help_of(name).rstrip()}\n```\n\n")
    return "".join(parts)


def file_of(name: str) -> str:
    """The script that is the same command.

    Args:
        name: of a command.
    """
    return FILES.get(name, f"scripts/{name.replace('-', '_')}.py")


def help_of(name: str) -> str:
    """What ``evenkeel NAME --help`` prints.

    Args:
        name: of a command.
    """
    told = io.StringIO()
    plain = mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    words = mock.patch.object(sys, "argv", ["evenkeel", name, "--help"])
    with plain, words, contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        console.main()
    return told.getvalue()
