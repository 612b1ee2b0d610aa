"""One run as one self-contained HTML page: ``python scripts/report_run.py RUN_DIR [--out FILE]``.

Losses and metrics by task with divergences and rollbacks marked, sigma by tensor, early signs by layer, sharpness, the
hold-out's table. Works on a run that is still going, was killed or is lost; a part that was not recorded says how to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ranker.atomic import write_text
from ranker.errors import UserError
from ranker.reports.run_page import Recorded, render


def main() -> None:
    """Reads the folder, and replaces the page whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="a run folder, such as runs/NAME")
    parser.add_argument("--out", type=Path, help="the page; default RUN_DIR/report.html")
    options = parser.parse_args()
    out: Path = options.out or options.run / "report.html"
    page = render(Recorded.read(options.run))
    write_text(out, page)
    print(out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
