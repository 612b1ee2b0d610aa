"""Find the largest stable learning rate: python scripts/stability.py model=large; same as evenkeel headroom."""

import sys

from ranker.commands.train import headroom as main

if __name__ == "__main__":
    sys.exit(main())
