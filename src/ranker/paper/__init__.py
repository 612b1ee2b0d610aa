"""Reproduction of the paper's tables and figures, and of some studies beyond it, from run folders.

A study (``study``) lists its training jobs as data (``jobs``), reads their run folders into small CSV files
(``store``) and renders Markdown and figures from those CSV files only (``rendering``). Every published number can
therefore be recomputed without training (``published``). ``scripts/reproduce.py`` is the command.

Source: Tang et al., KDD 2023 (arXiv 2302.09178).
"""
