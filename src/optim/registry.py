"""What a method consists of (update, reductions, rule for sigma), and the registry of methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from optim.hyperparameters import COMMON, Hyperparameter, check_names, nearest

ENTRY_POINT_GROUP = "evenkeel.optim"
"""Installed packages register methods by an entry point of this group, named as the method, loaded at first use."""

Settings = Mapping[str, Any]
"""The hyperparameters of one parameter group, `lr` included."""


class Coordinates(NamedTuple):
    """The coordinates of one tensor, or of a part of it, all of one shape.

    Attributes:
        weight: w, before the step.
        grad: g, the gradient as the update sees it (sign and coupled weight decay included).
        update: r, the step at learning rate 1 and sigma 1 (weight decay that joins it included).
        scale: r / g, the inverse root of the accumulator. None for an update that has no accumulator.
    """

    weight: Tensor
    grad: Tensor
    update: Tensor
    scale: Tensor | None


@dataclass(frozen=True, slots=True)
class Reduction:
    """One number per tensor: a 2-norm (`combine="norm"`) or a maximum of non-negative values (`combine="max"`).

    Both combinations have the identity 0 and can be taken over chunks, rows or shards in any order. The same
    definition therefore serves a small bias, the touched rows of a table and a matrix sharded over many devices.

    Attributes:
        name: The key under which the rule finds the number.
        combine: How the mapped coordinates are combined.
        map: Coordinates to the values that are combined, elementwise.
        kernel: The column of the C kernels that computes this reduction; None where only plain torch does.
        bound: For the kernel column "overshoot", max_i abs(r_i) / b_i: the coefficients (c0, c1, c2) of
            b_i = c0 * abs(w_i) + c1 + c2 / sqrt(G_i). The kernel may return any smaller value for a maximum of at most
            1 / lr, so the rule must return the same sigma for all of those. At most one such reduction per method.
    """

    name: str
    combine: Literal["norm", "max"]
    map: Callable[[Coordinates, Settings], Tensor]
    kernel: Literal["grad_norm", "weight_norm", "update_norm", "update_max", "overshoot"] | None = None
    bound: Callable[[Settings], tuple[float, float, float]] | None = None


GRAD_NORM = Reduction("grad_norm", "norm", lambda at, _: at.grad, "grad_norm")
WEIGHT_NORM = Reduction("weight_norm", "norm", lambda at, _: at.weight, "weight_norm")
UPDATE_NORM = Reduction("update_norm", "norm", lambda at, _: at.update, "update_norm")
UPDATE_MAX = Reduction("update_max", "max", lambda at, _: at.update.abs(), "update_max")


class Direction(NamedTuple):
    """What an update makes of a gradient.

    Attributes:
        update: r, same shape as the gradient.
        scale: r / g where the update is a diagonal scaling of g (Adagrad), else None.
    """

    update: Tensor
    scale: Tensor | None


class Update(Protocol):
    """How r follows from the gradient. All functions are pure: they never write to a tensor that they are given.

    A step computes the direction first (to choose sigma) and advances the state afterwards, or not at all where the
    gradient is not finite. Weight decay that is not decoupled is added to the gradient before; an update with an
    attribute `decays_update` that is true has weight_decay * w added to r instead.
    """

    @property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:
        """The update's own hyperparameters, beside the common ones."""
        ...

    def init(self, weight: Tensor, settings: Settings, /) -> dict[str, Tensor]:
        """Return the state of a fresh parameter: tensors of its shape, and 0-d tensors for counts."""
        ...

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], settings: Settings, /) -> Direction:
        """Return the direction for this gradient and this state."""
        ...

    def advance(self, grad: Tensor, state: Mapping[str, Tensor], settings: Settings, /) -> dict[str, Tensor]:
        """Return the state after this gradient."""
        ...


Rule = Callable[[Mapping[str, Tensor], Settings], Tensor]
"""(reductions by name, settings) -> sigma, elementwise over any number of tensors or units."""

Terms = Callable[[Coordinates, Settings], Mapping[str, Tensor]]
"""The terms that a bound is the sum of, by name (names from `TERMS`)."""

TERMS = ("relative", "absolute", "accumulator")

CAPABILITIES: Mapping[str, str] = {
    "dense": 'dense parameters, on any device, by plain torch or `backend="compiled"`',
    "narrow": "bfloat16 and float16 parameters, with state in float32",
    "sparse": "sparse gradients: only the touched rows and their state move",
    "dtensor": "DTensor, FSDP2 (norms and maxima over all shards)",
    "zero": "ZeroRedundancyOptimizer, as `optimizer_class=optim.SigmaOptimizer, method=NAME`",
    "checkpoint": "torch.distributed.checkpoint's state dicts",
    "closure": "closures",
    "tensor_lr": "a learning rate that is a tensor, in any dtype",
    "hooks": "hooks on the step and on state dicts",
    "grad_scaler": "GradScaler",
    "in_backward": "a step in the backward pass, one optimizer a parameter",
    "functional": "gradients of torch.func; a step under torch.func.functionalize",
    "swa": "AveragedModel, SWALR",
    "profiler": "the step's name in a profile",
    "compile": "torch.compile(optimizer.step)",
    "foreach": "torch.optim's keyword `foreach` (refused)",
}
"""What may be asked of a method. tests/optim/test_torch_checks.py has a test of each, for every method."""

SUPPORTS: Mapping[str, bool] = {capability: capability != "foreach" for capability in CAPABILITIES}
"""What every method made of an update and a rule supports."""


def _never(_settings: Settings) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Method:
    """w <- w - lr * sigma * r: which r (the update) and which sigma (the rule).

    Everything that the engine must know of a rule is a field here. A new rule is one file in `optim/methods` (or in
    another package) and, for the command line, one YAML file in `conf/optim`.

    Attributes:
        name: The name for `build_optimizer` and the command line.
        summary: One sentence.
        reference: The paper or code it comes from.
        update: How r follows from the gradient.
        sigma: The rule; None for sigma = 1 always.
        reductions: What the rule needs to know of a tensor.
        hyperparameters: The rule's own, beside the update's and the common ones.
        defaults: Defaults of inherited hyperparameters that this method replaces.
        presets: Values by preset name. They replace the defaults.
        update_for: The update under given settings, where hyperparameters of the rule change it. None for `update`.
        per_unit: Whether there is one sigma per output unit (dimension 0 of a matrix), not one per tensor.
        feeds_clipped: Whether the accumulator is fed the clipped gradient sigma * g. Where sigma depends on the
            gradient and the weights alone, r is then computed from sigma * g, too.
        never_clips: Whether these settings can never give a sigma below 1, so that no reduction is needed.
        limiting: The reduction whose largest coordinate decides sigma, for `clip_stats`; None where none does.
        terms: The terms of the bound at that coordinate.
        supports: Capability to whether it holds, for `get_info`.
    """

    name: str
    summary: str
    reference: str
    update: Update
    sigma: Rule | None = None
    reductions: tuple[Reduction, ...] = ()
    hyperparameters: tuple[Hyperparameter, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    update_for: Callable[[Settings], Update] | None = None
    per_unit: Callable[[Settings], bool] = _never
    feeds_clipped: Callable[[Settings], bool] = _never
    never_clips: Callable[[Settings], bool] = _never
    limiting: Reduction | None = None
    terms: Terms | None = None
    supports: Mapping[str, bool] = field(default_factory=lambda: dict(SUPPORTS))

    @property
    def all_hyperparameters(self) -> dict[str, Hyperparameter]:
        """Every hyperparameter by name: the common ones, the update's, the rule's. Later ones replace earlier ones."""
        return {known.name: known for known in (*COMMON, *self.update.hyperparameters, *self.hyperparameters)}

    @property
    def sees_update(self) -> bool:
        """Whether sigma depends on r, not on the gradient and the weights alone."""
        return any(reduction.name not in ("grad_norm", "weight_norm") for reduction in self.reductions)

    def resolve(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Complete and check the hyperparameters of one group. An explicit value wins over preset over default.

        None means "not given".

        Raises:
            TypeError: unknown hyperparameter, or a value of the wrong type.
            ValueError: a value out of range.
        """
        known = self.all_hyperparameters
        check_names(given, known, where)
        values = {name: spec.default for name, spec in known.items()} | dict(self.defaults)
        given = {name: value for name, value in given.items() if value is not None}
        if self.presets:
            values |= self.presets[known["preset"].check(given.get("preset", values["preset"]), where)]
        values |= given
        checked = {name: spec.check(values[name], where) for name, spec in known.items()}
        if checked.get("eps") == 0 and not checked.get("initial_accumulator_value"):
            raise ValueError(f"{where}: eps = 0 needs an initial accumulator above 0; a gradient of 0 would give 0 / 0")
        return checked


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


def register_rule(name: str, **fields: Any) -> Callable[[Rule], Rule]:
    """Decorator: register the decorated rule as a method. `fields` are those of `Method`.

    Examples:
        >>> @register_rule("half", summary="Half a step.", reference="none", update=ADAGRAD)
        ... def half(reduced, settings):
        ...     return torch.full_like(reduced["grad_norm"], 0.5)
    """

    def decorate(sigma: Rule) -> Rule:
        register(Method(name=name, sigma=sigma, **fields))
        return sigma

    return decorate


def list_optimizers() -> list[str]:
    """Return the names of all methods, including those of installed entry points, sorted."""
    return sorted({*_METHODS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def get_info(name: str) -> Method:
    """Return the record of a method: reference, hyperparameters with their ranges, what it supports.

    Raises:
        ValueError: no such method. The message names the nearest.
    """
    if name not in _METHODS:
        for point in entry_points(group=ENTRY_POINT_GROUP, name=str(name)):
            point.load()  # importing the module registers the method
    if name not in _METHODS:
        raise ValueError(f"unknown optimizer {name!r}; {nearest(str(name), list_optimizers())}")
    return _METHODS[name]
