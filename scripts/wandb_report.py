"""A report in W&B: python scripts/wandb_report.py ENTITY/PROJECT --metric click/auc; same as evenkeel wandb-report."""

import sys

from ranker.commands.wandb_command import wandb_report as main

if __name__ == "__main__":
    sys.exit(main())
