"""What all pictures share: size, look, and the two formats they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMATS = (".svg", ".png")


def figure(*, rows: int = 1, columns: int = 1, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, without a window system.

    Args:
        rows: of axes.
        columns: of axes.
        width: inches.
        height: inches.
        options: further ones of ``matplotlib.pyplot.subplots``, such as ``sharex``.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "evenkeel"  # the same picture gives the same file
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    for each in picture.axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
    return picture, axes


def save(picture: Any, destination: Path) -> None:
    """Writes a figure in every format and lets go of it.

    Args:
        picture: from ``figure``.
        destination: a path without an ending.
    """
    from matplotlib import pyplot

    for ending in FORMATS:
        metadata = {"Date": None} if ending == ".svg" else None
        picture.savefig(destination.with_suffix(ending), dpi=110, metadata=metadata)
    pyplot.close(picture)
