"""Prepares a public data set: python scripts/prepare_data.py kuairand SRC DST."""

from __future__ import annotations

import argparse
import sys

from ranker.data.prepare import RECIPES, prepare, print_summary
from ranker.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command line without the program's name; sys.argv where left out.

    Returns:
        The exit status: 0, or 1 with one line on standard error where the input is at fault.
    """
    parser = argparse.ArgumentParser(description="Published files to Parquet by UTC day, a schema and a manifest.")
    parser.add_argument("kind", choices=sorted(RECIPES), help="the data set")
    parser.add_argument("source", metavar="SRC", help="folder with the published files")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    try:
        manifest = prepare(given.kind, given.source, given.destination, progress=not given.quiet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_summary(manifest, where=given.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
