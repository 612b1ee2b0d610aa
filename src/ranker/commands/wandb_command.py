"""``evenkeel wandb-report``: a report in W&B that compares the runs of a project or a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ranker.cli import command
from ranker.errors import UserError


@command
def wandb_report(arguments: Sequence[str] | None = None) -> int:
    """Makes a report from the runs that were tracked online; prints its address."""
    parser = argparse.ArgumentParser(
        description="Make a report in W&B: losses, metrics and their comparison by optimizer and rate."
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs were tracked online")
    parser.add_argument(
        "--metric", nargs="+", required=True, help="such as click/auc watch_time/rmse; the first one compares"
    )
    parser.add_argument("--sweep", metavar="NAME", help="only the runs of the sweep with hydra.sweep.dir=.../NAME")
    parser.add_argument("--title", default="", help="title of the report")
    parser.add_argument("--draft", action="store_true", help="save it as a draft, which only you see")
    given = parser.parse_args(arguments)
    from ranker.reports.wandb_report import report

    made = report(given.project, given.metric, sweep=given.sweep, title=given.title)
    try:
        made.save(draft=given.draft)
    except Exception as error:  # of the network, of the server, of the login: wandb-workspaces has no class of its own
        raise UserError(f"W&B, {given.project}: {' '.join(str(error).split())[:300]}") from error
    print(made.url)
    return 0
