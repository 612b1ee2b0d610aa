"""The console command ``evenkeel``: picks a command by its name and imports only what that command needs."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext

from ranker import stop_signals
from ranker.errors import suggest

# Command: module within ranker.commands, function, description.
COMMANDS = {
    "train": ("train", "train", "train a model; takes Hydra overrides such as model=large optim=clippy"),
    "headroom": ("train", "headroom", "find the largest stable learning rate, or 1x of an own log, with short runs"),
    "prepare": ("data_commands", "prepare", "convert a public data set or an own log to Parquet"),
    "download": ("data_commands", "download", "download a public data set"),
    "inspect": ("data_commands", "inspect", "check a log, or propose a schema for one"),
    "report": ("report_commands", "report", "write one run as an HTML page"),
    "compare": ("report_commands", "compare", "compare several runs in a table or a page"),
    "wandb-report": ("wandb_command", "wandb_report", "make a report in W&B that compares tracked runs"),
    "plot": ("report_commands", "plot", "draw loss and AUC of several runs"),
    "daily": ("daily_command", "daily", "train day after day from yesterday's model; gate, promote or refuse"),
    "replay": ("replay_command", "replay", "replay a divergence, try alternatives, bisect it"),
    "export": ("export_commands", "export", "export the model of a run if it passes the gate"),
    "score": ("export_commands", "score", "score a Parquet file with an exported model"),
    "reproduce": ("reproduce_command", "reproduce", "reproduce a table or figure of the paper"),
}


def main() -> int:
    """Runs the command named by the first argument.

    Returns:
        The exit status of the command; 2 for an unknown command.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"error: unknown command '{name}'; {suggest(name, COMMANDS)}", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[name]
    sys.argv = [f"evenkeel {name}", *arguments]  # argparse shows it as the program's name
    with stop_signals.one_line() if module in ("train", "daily_command") else nullcontext():  # the import takes seconds
        return int(getattr(importlib.import_module(f"ranker.commands.{module}"), function)() or 0)


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:12} {description}" for name, (_, _, description) in COMMANDS.items()]
    return "\n".join(["usage: evenkeel COMMAND ...", "", *lines, "", "evenkeel COMMAND --help lists its options"])


if __name__ == "__main__":
    sys.exit(main())
