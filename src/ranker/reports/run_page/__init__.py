"""The HTML report of one run: a single file that loads nothing from the network."""

from ranker.reports.run_page.page import render
from ranker.reports.run_page.recorded import Recorded

__all__ = ["Recorded", "render"]
