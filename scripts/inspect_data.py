"""Looks over a prepared log: python scripts/inspect_data.py DIR [--quick]."""

from __future__ import annotations

import argparse
import datetime as dt
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ranker.data.filesystem import open_root
from ranker.data.inspection import broken_checksums, inspect_log, out_of_order
from ranker.data.manifest import MANIFEST_FILE, FileEntry, Manifest
from ranker.data.parquet_index import constant_columns
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
    warnings: list[str] = []
    manifest: Manifest | None = None
    try:
        text = open_root(given.root).read_bytes(MANIFEST_FILE)
        manifest = Manifest.from_json(text, where=f"{given.root}/{MANIFEST_FILE}") if text is not None else None
        if manifest is None:
            warnings.append(f"no {MANIFEST_FILE}: nobody can tell whether the files are whole and unchanged")
        elif given.quick:
            print_files(manifest.files, title=f"{MANIFEST_FILE}: {manifest.rows:,} rows")
        else:
            warnings += broken_checksums(Path(given.root), manifest)
        log = _opened(given.root)
        constants = ", ".join(constant_columns(log.index.metadata, log.schema))
        if constants:
            warnings.append(f"nothing can be learned from columns that never change: {constants}; drop them")
        if not given.quick:
            findings = inspect_log(log)
            print_files(findings.files, title=f"{log.num_rows:,} rows, of which {findings.bad:,} cannot be used")
            warnings += findings.warnings
    except UserError as error:
        if manifest is not None and not given.quick:
            print_files(manifest.files, title=f"{MANIFEST_FILE}: {manifest.rows:,} rows")
        _print_warnings([*warnings, *out_of_order(manifest.files if manifest is not None else ())])
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print_warnings(warnings)
    if not warnings:
        print("nothing looks wrong")
    return 0


def _opened(root: str) -> ParquetLog:
    """The log, without the warnings of opening it: they are among those that this script prints."""
    logger = logging.getLogger("ranker.data")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return ParquetLog(root, on_bad_rows="drop")
    finally:
        logger.setLevel(before)


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")


def _time(time_ms: int | None) -> str:
    if time_ms is None:
        return "-"
    return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")


if __name__ == "__main__":
    sys.exit(main())
