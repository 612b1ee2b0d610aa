"""Draw loss and AUC of runs: python scripts/plot_training.py RUN RUN --task is_click; same as evenkeel plot."""

import sys

from ranker.commands.report_commands import plot as main

if __name__ == "__main__":
    sys.exit(main())
