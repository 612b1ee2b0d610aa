"""Hooks of MkDocs: pages from outside docs/, generated pages, and links that hold in the repository and on the site.

A page is written for a reader of the repository, with links relative to its own file. ``PAGES`` and ``MIRRORED`` say
which files of the repository are on the site, and where. Links between them are rewritten. A link to a file of conf/
goes to its section of the option reference, and one to any other file becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import command_reference
import example_pages
import option_reference

ROOT = option_reference.ROOT
# Files of the repository, and where they are on the site. docs/X is X.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "src/optim/README.md": "optim.md",
}
MIRRORED = ("results/**/*.md", "results/**/*.png", "results/**/*.svg")
# A fenced or indented block, a link, or inline code, whichever begins first: a link may hold code, code holds no link.
PIECE = re.compile(
    r"^```.*?^```$|^ {4}[^\n]*$|(?P<picture>!?)\[(?P<words>[^\[\]]*)\]\((?P<address>[^()\s]+)\)|`[^`\n]+`",
    re.MULTILINE | re.DOTALL,
)
QUOTE_MARK = re.compile(r"^<!-- .* -->$", re.MULTILINE)


def sources() -> dict[str, str]:
    """Every file of the repository outside docs/ that is on the site: its path, and its place there."""
    mirrored = (path.relative_to(ROOT).as_posix() for pattern in MIRRORED for path in ROOT.glob(pattern))
    return PAGES | {path: path for path in sorted(mirrored)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for path, place in sources().items():
        # The tables of results/ are linked from the pages that discuss them.
        shown = InclusionLevel.NOT_IN_NAV if place.startswith("results/") else InclusionLevel.INCLUDED
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path), inclusion=shown))
    for place, text in generated().items():
        files.append(File.generated(config, place, content=text))
    return files


def generated() -> dict[str, str]:
    """The pages that are made from code: their place on the site and their Markdown."""
    pages = {"options.md": option_reference.markdown(), "commands.md": command_reference.markdown()}
    return pages | {f"examples/{path.stem}.md": example_pages.markdown(path) for path in example_pages.scripts()}


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Rewrites the links of a page, and sets off the marks around quoted tables, which Markdown would read as a row."""
    here = next((path for path, place in sources().items() if place == page.file.src_uri), f"docs/{page.file.src_uri}")
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # one page alone in its tab
    if page.file.src_uri.startswith("results/"):
        page.meta["search"] = {"exclude": True}  # rows of numbers; the pages that discuss them are found
    elif page.file.src_uri in ("options.md", "optim.md"):
        page.meta["search"] = {"boost": 2}
    return PIECE.sub(lambda match: _link(match, here, page.file.src_uri), QUOTE_MARK.sub("\n", markdown))


def _link(match: re.Match[str], here: str, place: str) -> str:
    """A link as it must be on the site; code as it is."""
    address = match["address"] or ""
    target, mark, part = address.partition("#")
    if ":" in target or not target:
        return match[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    goal = site_place(target)
    if not goal:
        if not (ROOT / target).exists():
            return match[0]  # MkDocs reports it
        return match["words"]
    goal, own_mark, own_part = goal.partition("#")
    address = posixpath.relpath(goal, posixpath.dirname(place) or ".") + (mark or own_mark) + (part or own_part)
    return f"{match['picture']}[{match['words']}]({address})"


def site_place(path: str) -> str:
    """Where a file of the repository is on the site, with the section for a file of conf/; empty if it is not there.

    Args:
        path: relative to the root of the repository.
    """
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("conf/") and path.endswith(".yaml"):
        group, _, name = path.removeprefix("conf/").removesuffix(".yaml").rpartition("/")
        return f"options.md#{option_reference.anchor(group, name)}"
    if path.startswith("examples/") and path.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    return sources().get(path, "")
