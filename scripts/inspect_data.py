"""Looks over a prepared log: python scripts/inspect_data.py DIR [--quick]."""

from __future__ import annotations

import argparse
import datetime as dt
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ranker.data.filesystem import open_root
from ranker.data.inspection import broken_checksums, inspect_log
from ranker.data.manifest import MANIFEST_FILE, FileEntry, Manifest
from ranker.data.parquet_log import ParquetLog
from ranker.errors import UserError


def print_files(files: Sequence[FileEntry], *, title: str) -> None:
    """One line a file; plain text, because label rates make it wider than most terminals."""
    print(f"{title}\n{'file':28} {'rows':>12}  {'first (UTC)':19}  {'last (UTC)':19}  rate of positives, or mean label")
    for entry in files:
        first, last = (_time(time_ms) for time_ms in (entry.time_min_ms, entry.time_max_ms))
        rates = [f"{name} {'-' if rate is None else f'{rate:.4g}'}" for name, rate in entry.label_rates.items()]
        print(f"{entry.path:28} {entry.rows:12,}  {first:19}  {last:19}  {', '.join(rates)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command line without the program's name; sys.argv where left out.

    Returns:
        The exit status: 0, also with warnings; 1 where the log cannot be trained on.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", metavar="DIR", help="a folder or URL with schema.yaml and Parquet files")
    parser.add_argument("--quick", action="store_true", help="manifest and footers alone, no look at the rows")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="warning: %(message)s")
    warnings: list[str] = []
    try:
        text = open_root(given.root).read_bytes(MANIFEST_FILE)
        manifest = Manifest.from_json(text, where=f"{given.root}/{MANIFEST_FILE}") if text is not None else None
        if manifest is None:
            warnings.append(f"no {MANIFEST_FILE}: nobody can tell whether the files are whole and unchanged")
        elif given.quick:
            print_files(manifest.files, title=f"{MANIFEST_FILE}: {manifest.rows:,} rows")
        else:
            warnings += broken_checksums(Path(given.root), manifest)
        log = ParquetLog(given.root, on_bad_rows="drop")
        if not given.quick:
            findings = inspect_log(log)
            print_files(findings.files, title=f"{log.num_rows:,} rows, of which {findings.bad:,} cannot be used")
            warnings += findings.warnings
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for warning in warnings:
        print(f"warning: {warning}")
    if not warnings:
        print("nothing looks wrong")
    return 0


def _time(time_ms: int | None) -> str:
    if time_ms is None:
        return "-"
    return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")


if __name__ == "__main__":
    sys.exit(main())
