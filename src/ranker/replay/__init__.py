"""Replay: training on the batches of a capsule again, exactly or with changes, to find the cause of a divergence."""
