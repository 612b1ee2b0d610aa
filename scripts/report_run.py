"""One run as an HTML page: python scripts/report_run.py RUN_DIR [--out FILE]; same as evenkeel report."""

import sys

from ranker.commands.report_commands import report as main

if __name__ == "__main__":
    sys.exit(main())
