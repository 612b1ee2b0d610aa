"""Score a Parquet file: python scripts/score.py EXPORT_DIR FILE.parquet --out FILE; same as evenkeel score."""

import sys

from ranker.commands.export_commands import score as main

if __name__ == "__main__":
    sys.exit(main())
