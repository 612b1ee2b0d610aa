"""Which parameter is treated how: ordered name patterns, embeddings by module type, and the default for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""What torch.optim takes, or a module, whose parameters then have names and module types."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """The parameters whose name a regular expression finds (`re.search`), and what is different for them."""

    pattern: str
    settings: Mapping[str, Any]


def parse_patterns(groups: Sequence[Mapping[str, Any]] | None) -> list[Pattern]:
    """Read the `groups` argument.

    Raises:
        TypeError: an entry is no mapping.
        ValueError: an entry has no pattern, or one that is no regular expression.
    """
    patterns = []
    for number, entry in enumerate(groups or ()):
        where = f"groups[{number}]"
        if not isinstance(entry, Mapping):
            raise TypeError(f"{where}: must be a mapping with a pattern, got {entry!r}")
        if not isinstance(entry.get("pattern"), str):
            raise ValueError(f"{where}: needs a pattern, a regular expression for parameter names")
        try:
            re.compile(entry["pattern"])
        except re.error as error:
            raise ValueError(f"{where}: {entry['pattern']!r} is no regular expression: {error}") from error
        settings = {str(name): value for name, value in entry.items() if name != "pattern"}
        patterns.append(Pattern(entry["pattern"], settings))
    return patterns


def embedding_parameters(module: nn.Module) -> set[Tensor]:
    """Return the parameters of all nn.Embedding and nn.EmbeddingBag modules inside, subclasses included."""
    tables = (part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag))
    return {parameter for table in tables for parameter in table.parameters(recurse=False)}


def split(
    named: Sequence[tuple[str, Tensor]],
    *,
    patterns: Sequence[Pattern],
    embeddings: set[Tensor],
    embedding: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Deal every parameter to exactly one group: the first pattern that matches, embeddings, or the rest.

    Returns:
        Parameter group dicts with `params` as (name, parameter) pairs and the settings of the group; the rest last.

    Raises:
        ValueError: a pattern matches no parameter that an earlier one left over.
    """
    left = list(named)
    groups: list[dict[str, Any]] = []
    for number, pattern in enumerate(patterns):
        matched = [pair for pair in left if re.search(pattern.pattern, pair[0])]
        if not matched:
            raise ValueError(
                f"groups[{number}]: pattern {pattern.pattern!r} matches none of the {len(left)} parameters left over "
                f"by the patterns before it, such as {', '.join(repr(name) for name, _ in left[:3]) or 'none'}"
            )
        groups.append({"params": matched, **pattern.settings})
        left = [pair for pair in left if not re.search(pattern.pattern, pair[0])]
    if embedding is not None:
        tables = [pair for pair in left if pair[1] in embeddings]
        if tables:
            groups.append({"params": tables, "method": "adagrad", **embedding})
            left = [pair for pair in left if pair[1] not in embeddings]
    if left:
        groups.append({"params": left})
    return groups
