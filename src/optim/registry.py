"""The registry of methods: a method is an update and a rule for sigma."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from optim.hyperparameters import COMMON, Hyperparameter, check_names, nearest
from optim.reductions import Coordinates, Reduction, Settings
from optim.updates import Update

ENTRY_POINT_GROUP = "evenkeel.optim"
"""Installed packages register methods by an entry point of this group, named as the method, loaded at first use."""

Sigma = Callable[[Mapping[str, Tensor], Settings], Tensor]
"""A rule: (reductions by name, settings) -> sigma, elementwise over however many tensors or units it is given."""

Terms = Callable[[Coordinates, Settings], Mapping[str, Tensor]]
"""The terms that a bound is the sum of, by name."""


SUPPORTS: Mapping[str, bool] = {
    "dense": True,
    "sparse": True,
    "foreach": False,
    "dtensor": True,
    "closure": True,
    "tensor_lr": True,
    "compile": True,
}
"""What every method made of an update and a rule can do."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """w <- w - lr * sigma * r: which r (the update) and which sigma (the rule).

    Attributes:
        name: What `build_optimizer` and the command line call it.
        summary: One sentence.
        reference: The paper or code it comes from.
        update: How r follows from the gradient.
        sigma: The rule; None for sigma = 1 always.
        reductions: What the rule must know of a tensor.
        hyperparameters: The rule's own, beside the update's and the common ones.
        defaults: Defaults of inherited hyperparameters that this method replaces.
        presets: Values by preset name, which replace the defaults.
        binding: The reduction whose largest coordinate decides sigma, for `clip_stats`; None where none does.
        terms: The terms of the bound there.
        idle: Whether these settings can never give a sigma below 1, so that nothing need be reduced.
        supports: Capability to whether it holds, for `get_info`. "foreach" is False: torch's `_foreach` functions would
            read memory more often than the C kernels on the CPU and torch.compile elsewhere do.
    """

    name: str
    summary: str
    reference: str
    update: Update
    sigma: Sigma | None = None
    reductions: tuple[Reduction, ...] = ()
    hyperparameters: tuple[Hyperparameter, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    binding: Reduction | None = None
    terms: Terms | None = None
    idle: Callable[[Settings], bool] | None = None
    supports: Mapping[str, bool] = field(default_factory=lambda: dict(SUPPORTS))

    @property
    def all_hyperparameters(self) -> dict[str, Hyperparameter]:
        """Every hyperparameter by name: the common ones, the update's, the rule's; later ones replace earlier."""
        return {known.name: known for known in (*COMMON, *self.update.hyperparameters, *self.hyperparameters)}

    @property
    def sees_update(self) -> bool:
        """Whether sigma depends on r, or on the gradient and the weights alone."""
        return any(reduction.name not in ("grad_norm", "weight_norm") for reduction in self.reductions)

    def resolve(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Complete and check the hyperparameters of one group: an explicit value wins over preset over default.

        None stands for "not given".

        Raises:
            TypeError: unknown hyperparameter, or a value of another kind.
            ValueError: a value out of range.
        """
        known = self.all_hyperparameters
        check_names(given, known, where)
        values = {name: spec.default for name, spec in known.items()} | dict(self.defaults)
        given = {name: value for name, value in given.items() if value is not None}
        if self.presets:
            values |= self.presets[known["preset"].check(given.get("preset", values["preset"]), where)]
        values |= given
        return {name: spec.check(values[name], where) for name, spec in known.items()}


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method under its name.

    Raises:
        ValueError: the name is taken.
    """
    if method.name in _METHODS:
        raise ValueError(f"optimizer {method.name!r} is already registered; choose another name")
    _METHODS[method.name] = method
    return method


def register_rule(name: str, **fields: Any) -> Callable[[Sigma], Sigma]:
    """Decorator: register the rule below it as a method; `fields` are those of `Method`.

    Example:
        >>> @register_rule("half", summary="Half a step.", reference="none", update=ADAGRAD)
        ... def half(reduced, settings):
        ...     return torch.full_like(reduced["grad_norm"], 0.5)
    """

    def decorate(sigma: Sigma) -> Sigma:
        register(Method(name=name, sigma=sigma, **fields))
        return sigma

    return decorate


def list_optimizers() -> list[str]:
    """Return the names of all methods, those of installed entry points included, sorted."""
    return sorted({*_METHODS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def get_info(name: str) -> Method:
    """Return the record of a method: reference, hyperparameters with their ranges, what it supports.

    Raises:
        ValueError: no such method; the message names the nearest.
    """
    if name not in _METHODS:
        for point in entry_points(group=ENTRY_POINT_GROUP, name=str(name)):
            point.load()  # importing the module registers the method
    if name not in _METHODS:
        raise ValueError(f"unknown optimizer {name!r}; {nearest(str(name), list_optimizers())}")
    return _METHODS[name]
