"""From a run folder to a program that serves, and from rows to scores. Torch, and the data path; no Lightning."""
