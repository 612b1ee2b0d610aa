"""Capsules: a divergence on disk, with the state before it and the batches around it."""
