"""Replay a divergence: python scripts/replay.py runs/NAME/capsules/step=120; same as evenkeel replay."""

import sys

from ranker.commands.replay_command import replay as main

if __name__ == "__main__":
    sys.exit(main())
