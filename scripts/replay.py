"""Replay a divergence: ``python scripts/replay.py runs/NAME/capsules/step=120``; see docs/stability.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ranker.cli import one_line_errors

CONF = Path(__file__).resolve().parent.parent / "conf"


def main() -> int:
    """Reproduces, tries alternatives or bisects; 1 where a reproduction differs, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capsule", type=Path, help="a folder such as runs/NAME/capsules/step=120")
    parser.add_argument("overrides", nargs="*", help="as for train.py: optim=clippy lr_mult=0.5; common to all --try")
    parser.add_argument(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="OVERRIDES",
        help="one more way: 'optim=gc lr_mult=2'",
    )
    parser.add_argument("--bisect", action="store_true", help="find step, batch, feature, rows, task and layer")
    parser.add_argument("--lookback", type=int, default=8, help="batches before the onset that are suspected")
    parser.add_argument("--horizon", type=int, default=20, help="batches after it in which the model must move")
    parser.add_argument("--out", type=Path, help="folder for pictures and tables; the capsule's own by default")
    options = parser.parse_intermixed_args()
    with one_line_errors():
        from ranker.replay.bisect import Limits  # imported late: torch and Lightning cost seconds
        from ranker.replay.session import Session

        session, out = Session(options.capsule), options.out or options.capsule
        if options.bisect:
            session.bisect(out=out, limits=Limits(lookback=options.lookback, horizon=options.horizon))
            return 0
        tries = [[*options.overrides, *text.split()] for text in options.tries or ([""] if options.overrides else [])]
        if tries:
            session.alternatives(tries, conf=CONF, out=out)
            return 0
        return 0 if session.reproduce() else 1


if __name__ == "__main__":
    sys.exit(main())
