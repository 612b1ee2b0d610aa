"""The HTML page of many runs: learning curves by group, a metric against the learning rate, a table of every run."""

from ranker.reports.sweep_page.page import render

__all__ = ["render"]
