"""Compare runs: python scripts/compare_runs.py multirun/NAME --metric is_click/auc; same as evenkeel compare."""

import sys

from ranker.commands.report_commands import compare as main

if __name__ == "__main__":
    sys.exit(main())
