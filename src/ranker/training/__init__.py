"""Training: the Lightning module, its callbacks, the run folder and the trackers."""
