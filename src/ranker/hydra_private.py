"""All uses of Hydra's private API, with the reason for each. ``tests/ranker/test_hydra_private.py`` checks them.

``BasicSweeper.split_arguments`` expands ``seed=0,1 lr_mult=1,2`` into jobs. Hydra has no public function for that, and
our own would have to repeat the semantics of Hydra's override grammar. ``OverridesParser`` parses that grammar; it is
outside ``hydra._internal``, but not documented.
"""

from __future__ import annotations

from collections.abc import Iterable

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override


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
