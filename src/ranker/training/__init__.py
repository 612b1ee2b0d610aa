"""Training: the Lightning module, the training step, the callbacks and the trackers."""
