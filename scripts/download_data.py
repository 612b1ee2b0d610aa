"""Fetches a public data set: python scripts/download_data.py kuairand-pure DIR. Needs internet."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ranker.data.prepare.download import ARCHIVES, Archive, fetch, unpack
from ranker.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command line without the program's name; sys.argv where left out.

    Returns:
        The exit status: 0, or 1 with one line on standard error.
    """
    parser = argparse.ArgumentParser(description="Downloads (resuming), checks and unpacks a public data set.")
    parser.add_argument("name", choices=sorted(ARCHIVES), help="the data set")
    parser.add_argument("folder", nargs="?", default="data", type=Path, help="where to put it (default: %(default)s)")
    parser.add_argument("--yes", action="store_true", help="agree to the licence without being asked")
    parser.add_argument("--mirror", metavar="URL", help="fetch the archive from this folder instead of its publisher")
    given = parser.parse_args(arguments)
    archive = ARCHIVES[given.name]
    if given.mirror:
        archive = replace(archive, url=f"{given.mirror.rstrip('/')}/{archive.file_name}")
    print(f"{given.name}, {archive.size}, from {archive.url}\n{archive.licence}")
    try:
        if not given.yes and not _agrees():
            return 1
        data = unpack(archive, _fetch(archive, given.folder), given.folder)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"ready: python train.py data={archive.kind} data.source={data}")
    return 0


def _agrees() -> bool:
    if not sys.stdin.isatty():
        raise UserError("nobody is there to agree to the licence; add --yes")
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def _fetch(archive: Archive, folder: Path) -> Path:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(archive.file_name, total=None)
        return fetch(archive, folder, progress=lambda done, total: bar.update(task, completed=done, total=total))


if __name__ == "__main__":
    sys.exit(main())
