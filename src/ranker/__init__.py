"""Evenkeel's framework: multitask rankers, time-ordered data and the tools that keep training stable."""
