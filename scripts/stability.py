"""Find the largest stable learning rate: python scripts/stability.py model=large; same as evenkeel headroom."""

from ranker.commands.train import headroom as main

if __name__ == "__main__":
    main()
