"""Multirun sweeps that can be restarted: finished jobs are skipped, and a failed job does not stop the others.

``job`` runs one job or skips it. ``watch`` keeps the journal of a sweep and prints its progress. ``job_list`` knows
which jobs a sweep has and how many run at a time. ``headroom_search`` is the sweeper ``hydra/sweeper=headroom``.
"""
