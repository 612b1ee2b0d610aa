"""The error for a user's mistake, and the checks that suggest the nearest known name."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES)


class UserError(ValueError):
    """A mistake in what the user asked for or supplied. The message is one line and is shown without a traceback."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Suggests the known names that are nearest to an unknown one.

    Args:
        name: the unknown name.
        options: all accepted names.

    Returns:
        A phrase that ends an error line, such as ``did you mean 'clippy'? (adagrad, clippy, gc)``.
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    listing = ", ".join(known) if known else "none exist"
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}? ({listing})"
    return f"known: {listing}"


def one_of(value: object, options: Sequence[str], where: str) -> None:
    """Checks that a value is one of the options.

    Args:
        value: the value to check.
        options: all accepted values.
        where: name of the setting, the start of the error line.

    Raises:
        UserError: it is not. The line names the nearest options.
    """
    if value not in options:
        raise UserError(f"{where} '{value}' is unknown; {suggest(str(value), options)}")


def install_hint(extra: str) -> str:
    """How to install the packages of an extra, such as ``export``; the package is not on PyPI yet."""
    return f"run pip install -e '.[{extra}]' in a clone, or pip install 'evenkeel-ranker[{extra}] @ git+URL'"


def disk_trouble(error: BaseException) -> str:
    """What is wrong with a disk and what to do, in one line; empty for other errors.

    Args:
        error: an error of the operating system names the path, except where it failed in the middle of a write.
    """
    if not isinstance(error, OSError) or error.errno not in (*_FULL, *_REFUSED):
        return ""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _FULL:
        do = (
            "make room there (space, or number of files), then run the command again; a run goes on with resume=RUN_DIR"
        )
    elif error.errno == errno.EROFS:
        do = "choose a folder that can be written, such as hydra.run.dir=DIR"
    else:  # the error does not say whether it was to be read or written
        do = "change its permissions, or choose another path; hydra.run.dir=DIR sets the run folder"
    return f"{where}{error.strerror}; {do}"
