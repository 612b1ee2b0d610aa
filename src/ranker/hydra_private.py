"""All uses of Hydra's private API, with the reason for each. ``tests/ranker/test_hydra_private.py`` checks them.

``BasicSweeper.split_arguments`` expands ``seed=0,1 lr_mult=1,2`` into jobs. Hydra has no public function for that, and
our own would have to repeat the semantics of Hydra's override grammar. ``OverridesParser`` parses that grammar; it is
outside ``hydra._internal``, but not documented.

The launchers announce every job in lines of their own, also a job that a group has trained before. No option leaves
them out, so a filter on the loggers does (``announce_only``).

Hydra composes the configuration twice: first only to look up ``hydra.mode``, which hardly anybody sets
(``composed_once``). And OmegaConf reads YAML with the parser in Python, though the one in C is a part of PyYAML
(``read_yaml_in_c``). Both are seconds of a sweep and tenths of a second of each start.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import _utils


def parse(arguments: Iterable[str], config_loader: ConfigLoader | None = None) -> list[Override]:
    """Parses overrides as they stand on the command line.

    Args:
        arguments: the overrides.
        config_loader: finds the options of a group, for ``optim=glob(*)``.
    """
    return OverridesParser.create(config_loader).parse_overrides(list(arguments))


def expand(overrides: list[Override]) -> list[list[str]]:
    """The jobs that overrides with several values stand for, each a list of overrides with one value."""
    return BasicSweeper.split_arguments(overrides, None)[0]


LAUNCHERS = ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins.hydra_joblib_launcher._core")  # loggers
_JOB = re.compile(r"\t#(\d+) : ")


class _Only(logging.Filter):
    """Passes the lines of some jobs."""

    def __init__(self, left: Collection[int]) -> None:
        super().__init__()
        self._left = left

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line of a launcher is shown."""
        job = _JOB.match(record.getMessage())
        return bool(self._left) if job is None else int(job[1]) in self._left


def announce_only(left: Collection[int] | None) -> None:
    """Leaves the lines out that announce jobs which are done, and all lines of a launcher where no job is left.

    Args:
        left: the numbers of the other jobs; None: shows every line again.
    """
    for name in LAUNCHERS:
        logger = logging.getLogger(name)
        for known in [known for known in logger.filters if isinstance(known, _Only)]:
            logger.removeFilter(known)
        if left is not None:
            logger.addFilter(_Only(left))


def read_yaml_in_c() -> None:
    """Lets OmegaConf parse YAML in C, where PyYAML was built with it. What is read is the same."""
    if hasattr(yaml, "CSafeLoader"):
        _utils.yaml = SimpleNamespace(**vars(yaml) | {"SafeLoader": yaml.CSafeLoader})  # type: ignore[assignment]


_MULTIRUN = "MULTIRUN"
_ELSEWHERE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")  # files of another folder
_SETS_MODE = ("hydra.mode", "hydra.searchpath")


@contextmanager
def composed_once(words: Sequence[str], conf: Path) -> Iterator[None]:
    """Lets Hydra's main compose a configuration once, unless a word or a file may set ``hydra.mode``.

    Args:
        words: the command line.
        conf: the folder with the configuration files, in which somebody may have written ``mode: MULTIRUN``.
    """
    from hydra._internal.hydra import Hydra

    plain = Hydra.get_mode
    by_word = any(word.startswith(_ELSEWHERE) or any(key in word for key in _SETS_MODE) for word in words)
    if not by_word and not any(_MULTIRUN in file.read_text("utf-8", "replace") for file in conf.rglob("*.yaml")):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = plain  # type: ignore[method-assign]
