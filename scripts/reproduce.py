"""Reproduce a table of the paper: python scripts/reproduce.py table2; same as evenkeel reproduce."""

import sys

from ranker.commands.reproduce_command import reproduce as main

if __name__ == "__main__":
    sys.exit(main())
