"""Sweeps that finish: jobs recognised by their configuration, failures that end nobody else, one account of them all.

``previous_runs`` finds and clears earlier attempts; ``job`` runs a
job or skips it; ``journal`` is the file through which jobs, in whatever process, tell the sweep how they are; ``watch``
is Hydra's callback that prints it; ``jobs_file`` is the list that ``hydra/sweeper=list`` launches.
"""
