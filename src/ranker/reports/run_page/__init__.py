"""One run as one HTML page that needs nothing else: no network, no fonts, no scripts from elsewhere."""

from ranker.reports.run_page.page import render
from ranker.reports.run_page.recorded import Recorded

__all__ = ["Recorded", "render"]
