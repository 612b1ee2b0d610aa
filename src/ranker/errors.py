"""Errors a person can act on: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for or gave; its message is one line and is shown without a stack."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Says which names come nearest to an unknown one.

    Args:
        name: what the user wrote.
        options: every name that would have been accepted.

    Returns:
        A phrase to end an error line with, such as ``did you mean 'clippy'? (adagrad, clippy, gc)``.
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    listing = ", ".join(known) if known else "none exist"
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}? ({listing})"
    return f"known: {listing}"


def install_hint(extra: str) -> str:
    """How to install the packages of an extra, such as ``export``; the package is not on PyPI yet."""
    return f"run pip install -e '.[{extra}]' in a clone, or pip install 'evenkeel-ranker[{extra}] @ git+URL'"
