"""A headless Chromium for tests of pages: the document after its scripts ran, and what was said on the console."""

from __future__ import annotations

import html.parser
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
]


@dataclass(frozen=True)
class Seen:
    """A page as a browser has it: the document after the scripts, and the lines of its console."""

    dom: str
    console: list[str]


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that is never closed, and notes what would be fetched."""

    VOID = frozenset({"meta", "link", "path", "rect", "line", "circle", "br", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href") and not str(v).startswith(("#", "data:"))]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag


def browser() -> str:
    """The browser of this machine; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return found


def opened(page: Path, profile: Path, *, script: str = "") -> Seen:
    """Opens a page.

    Args:
        page: the file.
        profile: an empty folder for the browser.
        script: what a user would do, run in a copy of the page after its own scripts.
    """
    shown = page
    if script:
        shown = page.with_name(f"acted-{page.name}")
        shown.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [browser(), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", shown.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Seen(ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line])


def screenshot(
    page: Path, picture: Path, profile: Path, *, width: int = 1366, height: int = 3000, dark: bool = False
) -> None:
    """Writes a picture of a page at the width of a laptop, for people to look at."""
    mode = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    size = [f"--window-size={width},{height}", f"--screenshot={picture}"]
    command = [browser(), *FLAGS, *mode, *size, f"--user-data-dir={profile}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
