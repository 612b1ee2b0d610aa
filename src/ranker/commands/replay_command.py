"""``evenkeel replay``: reproduce a divergence from its capsule, try alternatives, or bisect it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ranker.cli import add_trust, command
from ranker.installation import conf_folder


@command
def replay(arguments: Sequence[str] | None = None) -> int:
    """Runs a replay.

    Returns:
        The exit status: 0, 1 where a reproduction differs from the run, 2 for a mistake of the user.
    """
    parser = argparse.ArgumentParser(
        description="Replay a divergence from its capsule, such as runs/NAME/capsules/step=120; see docs/stability.md."
    )
    parser.add_argument("capsule", type=Path, help="a folder such as runs/NAME/capsules/step=120")
    parser.add_argument("overrides", nargs="*", help="as for train.py: optim=clippy lr_mult=0.5; common to all --try")
    parser.add_argument(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="OVERRIDES",
        help="one alternative: 'optim=gc lr_mult=2'; may be given several times",
    )
    parser.add_argument("--bisect", action="store_true", help="find the step, batch, feature, rows, task and layer")
    parser.add_argument("--lookback", type=int, default=8, help="batches before the onset that are suspected")
    parser.add_argument("--horizon", type=int, default=20, help="batches after the onset in which the model must move")
    parser.add_argument("--out", type=Path, help="folder for pictures and tables (default: the capsule)")
    add_trust(parser)
    options = parser.parse_intermixed_args(arguments)
    from ranker.replay.bisect import Limits  # imported late: torch and Lightning cost seconds
    from ranker.replay.session import Session

    session, out = Session(options.capsule, trusted=options.trust), options.out or options.capsule
    if options.bisect:
        session.bisect(out=out, limits=Limits(lookback=options.lookback, horizon=options.horizon))
        return 0
    tries = [[*options.overrides, *text.split()] for text in options.tries or ([""] if options.overrides else [])]
    if tries:
        session.alternatives(tries, conf=conf_folder(), out=out)
        return 0
    return 0 if session.reproduce() else 1
