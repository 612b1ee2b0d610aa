"""Check a log, or propose a schema: python scripts/inspect_data.py DIR [--html]; same as evenkeel inspect."""

import sys

from ranker.commands.data_commands import inspect as main

if __name__ == "__main__":
    sys.exit(main())
