"""Score a Parquet file with an export: ``python scripts/score.py EXPORT_DIR FILE.parquet --out scores.parquet``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ranker.errors import UserError
from ranker.export.bundle import PROGRAMS, Export, counted
from ranker.export.program_runtime import open_program
from ranker.export.scoring import ON_BAD_ROWS, ParquetRows, score_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command line without the program's name; sys.argv where left out.

    Returns:
        The exit status: 0, or 2 after one line that says what is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", metavar="EXPORT_DIR", type=Path, help="a folder that scripts/export.py wrote")
    parser.add_argument("file", metavar="FILE.parquet", type=Path, help="rows to score; labels may be missing")
    parser.add_argument("--out", type=Path, required=True, help="Parquet: the row id, and a column a task")
    parser.add_argument("--format", choices=list(PROGRAMS), default="pt2", help="which program (default: %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=8192, help="rows at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the library's own choice")
    parser.add_argument("--on-bad-rows", choices=ON_BAD_ROWS, default="raise", help="null gives such a row no score")
    given = parser.parse_args(arguments)
    try:
        export = Export.read(given.export)
        rows = ParquetRows(given.file, export.schema, piece_rows=given.batch_rows, on_bad_rows=given.on_bad_rows)
        engine = open_program(export.program(given.format), schema=export.schema, threads=given.threads)
        start = time.monotonic()
        with counted("scoring", total=rows.num_rows, console=Console(stderr=True)) as advance:
            missing = score_file(rows, engine, given.out, tasks=export.schema.task_names, advance=advance)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {given.out} was not written", file=sys.stderr)
        return 130
    seconds = time.monotonic() - start
    print(f"{given.out}: {rows.num_rows:,} rows, {rows.num_rows / max(seconds, 1e-9):,.0f} rows/s")
    if missing:
        print(f"{missing:,} rows could not be used and have no score")
    return 0


if __name__ == "__main__":
    sys.exit(main())
