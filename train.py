"""Train a multitask ranker: ``python train.py model=large_dcn optim=clippy lr_mult=2``; ``--help`` lists the rest.

The same as ``evenkeel train``.
"""

from ranker.commands.train import train

if __name__ == "__main__":
    train()
