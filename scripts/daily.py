"""Train day after day: python scripts/daily.py data.source=DIR daily.dir=DIR; same as evenkeel daily."""

import sys

from ranker.commands.daily_command import daily as main

if __name__ == "__main__":
    sys.exit(main())
