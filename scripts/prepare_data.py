"""Prepare a data set or an own log: python scripts/prepare_data.py kuairand SRC DST; same as evenkeel prepare."""

import sys

from ranker.commands.data_commands import prepare as main

if __name__ == "__main__":
    sys.exit(main())
