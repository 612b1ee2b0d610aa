"""The learning rate called 1x of a log, in ``base_lr.yaml`` beside its schema: written once, read by each run."""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from ranker.atomic import write_text
from ranker.errors import UserError

BASE_LR_FILE = "base_lr.yaml"
UNKNOWN = 0.1  # where nobody has looked


def read_base_lr(source: str | None, scale: str) -> float:
    """1x of a log at a scale; ``UNKNOWN`` where the log has no file, or no value for this scale.

    Args:
        source: folder or URL of the log; None where none is given yet.
        scale: such as ``laptop``.

    Raises:
        UserError: the file is no mapping of scales to numbers above 0.
    """
    from ranker.data.filesystem import open_root  # imported late: this module is read by each start, also of --help

    text = open_root(source).read_bytes(BASE_LR_FILE) if source else None
    if text is None:
        return UNKNOWN
    where = f"{source}/{BASE_LR_FILE}"
    value = _rates(text, where).get(scale)
    if value is None:
        return UNKNOWN
    if not isinstance(value, int | float) or isinstance(value, bool) or not (value > 0 and math.isfinite(value)):
        raise UserError(f"{where}: {scale} must be a number above 0, got {value!r}")
    return float(value)


def write_base_lr(source: str, scale: str, rate: float, *, note: str) -> Path | None:
    """Writes 1x of a local log at a scale; values of other scales stay.

    Args:
        source: its folder.
        scale: such as ``laptop``.
        rate: the learning rate.
        note: a comment, one line.

    Returns:
        The file; None for a URL or a folder that cannot be written.
    """
    if "://" in source:
        return None
    path = Path(source).expanduser() / BASE_LR_FILE
    rates = _rates(path.read_bytes(), str(path)) if path.is_file() else {}
    rates[scale] = rate
    try:
        write_text(
            path, f"# 1x of this log: the learning rate that lr_mult multiplies. {note}\n{yaml.safe_dump(rates)}"
        )
    except OSError:
        return None
    return path


def _rates(text: bytes, where: str) -> dict[str, object]:
    try:
        rates = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())[:120]}") from error
    if not isinstance(rates, dict):
        raise UserError(f"{where} must give a number for each scale, such as laptop: 0.1")
    return rates
