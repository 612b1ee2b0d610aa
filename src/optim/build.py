"""`build_optimizer`: the one way to make an optimizer, for the command line and for library users alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import optim.methods  # noqa: F401  (registers them)
from optim.grouping import Params, embedding_parameters, parse_patterns, split
from optim.hyperparameters import SHARED
from optim.optimizer import SigmaOptimizer
from optim.registry import get_info


def build_optimizer(
    name: str,
    model_or_params: Params,
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
            `{"method": "adagrad", "initial_accumulator_value": 0.1}`; the method is plain Adagrad unless it says
            otherwise. Needs a module; not used where the module has no embedding.
        groups: Ordered `{"pattern": regex, "method": name, ...overrides}`; `re.search` on the parameter's name, the
            first match wins, and over `embedding`. What nothing matches is treated by `name`.
        **hyperparameters: Those of the method (see `get_info(name).all_hyperparameters`), and for the whole optimizer
            `on_nonfinite`, `collect_stats` and `backend`. None leaves a default.

    Raises:
        TypeError: an unknown hyperparameter or a value of the wrong kind; the message names the nearest.
        ValueError: an unknown method, a value out of range, a pattern that matches nothing, no parameters.

    Example:
        >>> optimizer = build_optimizer("clippy", model, lr=0.1, embedding={"method": "adagrad"})
    """
    method = get_info(name)
    shared = {spec.name: hyperparameters.pop(spec.name, None) for spec in SHARED}
    defaults = method.resolve({"lr": lr, **hyperparameters}, where=name)
    if embedding is not None and not isinstance(embedding, Mapping):
        raise TypeError(f"embedding: must be a mapping of settings or None, got {embedding!r}")
    patterns = parse_patterns(groups)
    if isinstance(model_or_params, nn.Module):
        entries: list[Any] = split(
            list(model_or_params.named_parameters()),
            patterns=patterns,
            embeddings=embedding_parameters(model_or_params),
            embedding=embedding,
        )
    else:
        entries = _split_iterable(list(model_or_params), patterns, embedding)
    return SigmaOptimizer(entries, method=name, defaults=defaults, **shared)


def _split_iterable(entries: list[Any], patterns: list[Any], embedding: Mapping[str, Any] | None) -> list[Any]:
    """Apply patterns to (name, tensor) pairs; leave plain tensors and group dicts as they are."""
    if embedding is not None:
        raise ValueError("embedding: module types are needed to find the embeddings; pass the module itself")
    if not patterns:
        return entries
    if not all(isinstance(entry, tuple) for entry in entries):
        raise ValueError("groups: patterns need names; pass the module or model.named_parameters()")
    return split(entries, patterns=patterns, embeddings=set(), embedding=None)
