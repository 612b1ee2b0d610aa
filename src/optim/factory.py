"""`build_optimizer`: an optimizer by the name of its method, over a module's parameters sorted into groups."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optim.optimizer import Params, SigmaOptimizer
from optim.registry import get_info


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The parameters whose name a regular expression finds (`re.search`), and their settings."""

    pattern: str
    settings: Mapping[str, Any]


def build_optimizer(
    name: str,
    model_or_params: nn.Module | Params,
    *,
    lr: float | Tensor,
    embedding: Mapping[str, Any] | None = None,
    groups: Sequence[Mapping[str, Any]] | None = None,
    **hyperparameters: Any,
) -> SigmaOptimizer:
    """Return one optimizer over all parameters: w <- w - lr * sigma * r.

    Args:
        name: The method, one of `list_optimizers()`.
        model_or_params: A module; or tensors, (name, tensor) pairs or parameter group dicts, as torch.optim takes.
        lr: Learning rate eta, per step; a number, or a tensor of one element that a schedule writes to.
        embedding: Settings for the parameters of nn.Embedding and nn.EmbeddingBag, such as
            `{"method": "adagrad", "initial_accumulator_value": 0.1}`. The default method is "adagrad". Needs a module.
            Not used where the module has no embedding.
        groups: Ordered `{"pattern": regex, "method": name, ...overrides}`. `re.search` on the parameter's name; the
            first match wins, and wins over `embedding`. Parameters that nothing matches are treated by `name`.
        **hyperparameters: Those of the method (see `get_info(name).all_hyperparameters`), and for the whole optimizer
            `on_nonfinite`, `collect_stats` and `backend`. None means the default.

    Raises:
        TypeError: an unknown hyperparameter or a value of the wrong type. The message names the nearest.
        ValueError: an unknown method, a value out of range, a pattern that matches nothing, no parameters.

    Examples:
        >>> optimizer = build_optimizer("clippy", model, lr=0.1, embedding={"method": "adagrad"})
    """
    get_info(name)  # an unknown method is reported before anything else
    if embedding is not None and not isinstance(embedding, Mapping):
        raise TypeError(f"embedding: must be a mapping of settings or None, got {embedding!r}")
    patterns = _parse_patterns(groups)
    if isinstance(model_or_params, nn.Module):
        tables = _embedding_parameters(model_or_params)
        entries: list[Any] = _split(list(model_or_params.named_parameters()), patterns, tables, embedding)
    elif isinstance(model_or_params, Tensor):
        raise TypeError("params must be a module or an iterable of tensors, pairs or dicts, got a single tensor")
    else:
        entries = list(model_or_params)
        if embedding is not None:
            raise ValueError("embedding: module types are needed to find the embeddings; pass the module itself")
        if patterns and not all(isinstance(entry, tuple) for entry in entries):
            raise ValueError("groups: patterns need names; pass the module or model.named_parameters()")
        if patterns:
            entries = _split(entries, patterns, set(), None)
    return SigmaOptimizer(entries, name, lr=lr, **hyperparameters)


def _parse_patterns(groups: Sequence[Mapping[str, Any]] | None) -> list[_Pattern]:
    """Read the `groups` argument.

    Raises:
        TypeError: an entry is not a mapping.
        ValueError: an entry has no pattern, or one that is not a regular expression.
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
        patterns.append(_Pattern(entry["pattern"], settings))
    return patterns


def _embedding_parameters(module: nn.Module) -> set[Tensor]:
    """Return the parameters of all nn.Embedding and nn.EmbeddingBag modules inside, subclasses included."""
    tables = (part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag))
    return {parameter for table in tables for parameter in table.parameters(recurse=False)}


def _split(
    named: Sequence[tuple[str, Tensor]],
    patterns: Sequence[_Pattern],
    tables: set[Tensor],
    embedding: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Assign every parameter to exactly one group: the first pattern that matches, embeddings, or the rest.

    Returns:
        Parameter group dicts with `params` as (name, parameter) pairs and the settings of the group; the rest last.

    Raises:
        ValueError: a pattern matches none of the parameters that earlier patterns left.
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
        found = [pair for pair in left if pair[1] in tables]
        if found:
            groups.append({"params": found, "method": "adagrad", **embedding})
            left = [pair for pair in left if pair[1] not in tables]
    if left:
        groups.append({"params": left})
    return groups
