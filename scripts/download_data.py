"""Download a public data set: python scripts/download_data.py kuairand-pure DIR; same as evenkeel download."""

import sys

from ranker.commands.data_commands import download as main

if __name__ == "__main__":
    sys.exit(main())
