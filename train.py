"""Train a multitask ranker: ``python train.py model=large_dcn optim=clippy lr_mult=2``; ``--help`` lists the rest.

The same as ``evenkeel train``.
"""

if __name__ == "__main__":
    from ranker import stop_signals

    with stop_signals.one_line():  # the import takes seconds
        from ranker.commands.train import train

        train()
