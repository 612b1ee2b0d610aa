"""The tables and figures of the paper, and some beyond it, from runs.

A study says as data which jobs it needs (``jobs``, ``grid``), reads their run folders into small CSV files (``store``)
and writes Markdown and pictures from those files alone (``markdown``, ``pictures``), so that every published number can
be computed again without a run (``published``). ``scripts/reproduce.py`` puts them together.

Source: Tang et al., KDD 2023 (arXiv 2302.09178).
"""
