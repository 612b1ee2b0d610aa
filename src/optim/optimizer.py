"""`SigmaOptimizer`, the torch.optim.Optimizer of this package: choose sigma for every tensor, then step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypedDict, overload

import torch
from torch import Tensor

from optim import stats
from optim.checkpoint import SKIPPED, fit
from optim.eager import COMPILED, EAGER
from optim.hyperparameters import SHARED, check_names
from optim.local_params import LocalParam, lasting, make_local, named_params
from optim.native.backend import NATIVE, is_available
from optim.native.plan import Plan
from optim.registry import Method, Update, get_info
from optim.tensor_group import Backend, TensorGroup, all_finite, choose_sigma, make_groups

WARNED = "warned_still"
_SHARED = {spec.name: spec for spec in SHARED}
_INTERNAL = {"params", "param_names", "method", "initial_lr", SKIPPED}
_BACKENDS: Mapping[str, tuple[Backend, ...]] = {
    "auto": (NATIVE, EAGER),
    "native": (NATIVE, EAGER),
    "eager": (EAGER,),
    "compiled": (COMPILED,),
}

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""What torch.optim takes. Group dicts may hold a `method` and any of its hyperparameters."""


class Common(TypedDict, total=False):
    """The keyword arguments that every optimizer of this package takes; `hyperparameters.py` describes them."""

    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool
    sparse_sigma: str
    on_nonfinite: str
    collect_stats: bool
    backend: str


class SigmaOptimizer(torch.optim.Optimizer):
    """w <- w - lr * sigma * r, every parameter group with its own method and hyperparameters.

    `build_optimizer` makes it by the name of a method. The subclasses in `optim.methods` (`Clippy`, `GC`, ...) make it
    with the signature of one method. All configuration is in `param_groups` and all state in `state`, as tensors,
    numbers and strings, so a state_dict of one loads into the other.

    Args:
        params: What torch.optim takes. Group dicts may hold a `method` and any of its hyperparameters.
        method: The method of groups that name none.
        hyperparameters: Those of the method, and `on_nonfinite`, `collect_stats`, `backend`. None means the default.

    Raises:
        TypeError: an unknown hyperparameter or a value of the wrong type. The message names the nearest.
        ValueError: an unknown method, a value out of range, no parameters.
    """

    _plan: Plan | None = None  # not in __init__, which a copy or a loaded pickle does not run

    def __init__(self, params: Params, method: str, **hyperparameters: Any) -> None:
        shared = {}
        for name, spec in _SHARED.items():
            value = hyperparameters.pop(name, None)
            shared[name] = spec.check(spec.default if value is None else value, method)
        defaults = get_info(method).resolve(hyperparameters, where=method)
        if shared["backend"] == "native" and not is_available():
            raise ValueError(f"{method}: backend 'native' needs a C compiler and found none; use 'auto' or 'eager'")
        super().__init__(params, {"method": method, **defaults, **shared, WARNED: False})

    @property
    def collect_stats(self) -> bool:
        """Whether `clip_stats()` is kept. May be switched at any time."""
        return bool(self.defaults["collect_stats"])

    @collect_stats.setter
    def collect_stats(self, value: bool) -> None:
        self.defaults["collect_stats"] = _SHARED["collect_stats"].check(value, "optimizer")

    @property
    def backends(self) -> tuple[Backend, ...]:
        """What steps the tensors, in order of preference."""
        return _BACKENDS[self.defaults["backend"]]

    @property
    def skipped_steps(self) -> int:
        """How many steps `on_nonfinite="skip"` skipped. Reading it waits for the device."""
        return int(sum(group[SKIPPED] for group in self.param_groups if SKIPPED in group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own method and hyperparameters. Missing ones come from the default method.

        Raises:
            TypeError: an unknown hyperparameter, or a parameter that is not real and floating.
            ValueError: a value out of range, or a parameter that another group has.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = dict(param_group)
        method = get_info(group.setdefault("method", self.defaults["method"]))
        where = f"group {len(self.param_groups)} ({method.name})"
        given = {name: value for name, value in group.items() if name not in _INTERNAL}
        for name in _SHARED:
            # ZeroRedundancyOptimizer puts every argument of the optimizer into every group.
            if name in given and given.pop(name) != self.defaults[name]:
                raise TypeError(f"{where}: {name} belongs to the optimizer as a whole; pass it to build_optimizer")
        inherited = self.defaults if method.name == self.defaults["method"] else {"lr": self.defaults["lr"]}
        known = method.all_hyperparameters
        check_names(given, known, where)
        if "preset" in given:
            inherited = {"lr": self.defaults["lr"]}
        settings = method.resolve({name: inherited[name] for name in known if name in inherited} | given, where)
        count = sum(len(other["params"]) for other in self.param_groups)
        group["params"] = _named(group["params"], group.pop("param_names", None), start=count)
        super().add_param_group({**group, **settings})
        added = self.param_groups[-1]
        for name in self.defaults:  # torch copies every default into every group
            # OneCycleLR and CyclicLR look for betas in every group if the defaults have them.
            if name not in settings and name not in ("method", "betas"):
                del added[name]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step from the current gradients. Never waits for the device, except for on_nonfinite="raise".

        Args:
            closure: Recomputes the loss and the gradients, and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            FloatingPointError: a gradient is not finite and on_nonfinite="raise". Nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, plan = self._groups()
        self._step(groups)
        if plan is not None:
            plan.release()
            self._plan = plan
        return loss

    def _step(self, groups: list[TensorGroup]) -> None:
        if not groups:
            return
        for group in groups:
            choose_sigma(group)
        ok = self._check_finite(groups)
        for group in groups:
            go = ok.get(group.device)
            if not self.collect_stats:
                group.backend.apply(group, go, measure=False)
                continue
            rows = stats.rows_of(group, self.state)
            if not group.backend.apply_and_record(group, go, rows):
                reasons = stats.explain(group)  # before the step changes the weights that sigma was chosen for
                stats.record(group, reasons, group.backend.apply(group, go, measure=True), rows, go)

    def _groups(self) -> tuple[list[TensorGroup], Plan | None]:
        """The groups of this step, those of the last one where only gradients are new, and the plan that has them."""
        if torch.compiler.is_compiling():
            return make_groups(self.gather(), self.backends), None
        # Taken out at once: another thread must not step the same groups, nor a step go on from one that raised.
        plan: Plan | None = self.__dict__.pop("_plan", None)
        treatment = [(id(group), self.defaults["backend"], *_sorting(group)) for group in self.param_groups]
        params = [param for group in self.param_groups for param in group["params"]]
        if plan is not None and plan.renew(treatment, params, self.state, self._again):
            return plan.groups, plan
        groups = make_groups(self.gather(), self.backends)
        return groups, Plan.of(groups, treatment, params, self.state)

    def _again(self, local: LocalParam) -> LocalParam:
        return self._local(local.name, local.param, local.method, local.update, local.settings, keep_state=True)

    def gather(self, *, keep_state: bool = True, names: Collection[str] | None = None) -> list[LocalParam]:
        """Return every parameter with a gradient, in its local, dense form.

        Args:
            keep_state: Whether the fresh state of a new parameter is stored. False changes nothing at all.
            names: Only parameters of these names; None for all.
        """
        gathered = []
        treatment = {id(group): _treatment(group) for group in self.param_groups}
        for group, name, param in named_params(self.param_groups):
            if param.grad is not None and (names is None or name in names):
                gathered.append(self._local(name, param, *treatment[id(group)], group, keep_state=keep_state))
        return gathered

    def _local(
        self, name: str, param: Tensor, method: Method, update: Update, group: dict[str, Any], *, keep_state: bool
    ) -> LocalParam:
        kept = self.state.get(param, {})
        state = {key: value for key, value in kept.items() if key != stats.STATE_KEY}
        if not state:
            with lasting():
                state = update.init(param.detach(), group)
            if keep_state:
                self.state[param].update(state)
        for key, value in state.items():
            # A count that a loader left on the CPU (ZeroRedundancyOptimizer does) would be copied at every step.
            if not value.ndim and param.ndim and value.device != param.device:
                state[key] = value.to(param.device)
                if keep_state:
                    kept[key] = state[key]
        return make_local(name, param, method, update, group, state)

    def _check_finite(self, groups: list[TensorGroup]) -> dict[torch.device, Tensor]:
        """Return for every device whether to take the step; empty where nothing is checked."""
        policy = self.defaults["on_nonfinite"]
        if policy == "propagate":
            return {}
        ok = all_finite(groups)
        if policy == "raise":
            if not all(ok.values()):
                names = [local.name for group in groups for local in group.locals if not local.is_finite()]
                raise FloatingPointError(
                    f"gradient of {', '.join(names) or 'another rank'} is not finite, or its square is not"
                )
            return {}
        counter = self.param_groups[0]
        first = next(iter(ok.values()))
        if SKIPPED not in counter:
            with lasting():
                counter[SKIPPED] = torch.zeros((), dtype=torch.long, device=first.device)
        elif counter[SKIPPED].device != first.device:
            counter[SKIPPED] = counter[SKIPPED].to(first.device)
        counter[SKIPPED].add_(first.logical_not())  # in place: a CUDA graph addresses tensors by their memory
        return ok

    def clip_stats(self) -> dict[str, stats.ClipStats]:
        """Return by parameter name what clipping did; empty where collect_stats is off.

        Reading waits for the device. See `ClipStats` for the fields.

        Warns:
            UserWarning: once, when weights of 0 and a tiny lambda_abs keep a tensor from moving.
        """
        if not self.collect_stats:
            return {}
        report = stats.read(self.param_groups, self.state)
        still = [name for name, row in report.items() if row["still"]]
        if still and not self.defaults[WARNED]:
            self.defaults[WARNED] = True
            warnings.warn(
                f"{', '.join(still)}: held still, because a weight of 0 may move by lambda_abs only; raise lambda_abs "
                "(the paper uses 1e-2) or start from other weights",
                stacklevel=2,
            )
        return report

    def last_step(self) -> dict[str, stats.LastStep]:
        """Return by parameter name what the last step did, on the device; empty where collect_stats is off.

        The tensors are copies, which later steps do not change. Nothing waits until a number is read.
        """
        return stats.last_step(self.param_groups, self.state) if self.collect_stats else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict, of this package or of the torch.optim optimizer with the same update. See `fit`.

        State is kept in the parameter's dtype, but never narrower than float32, where torch would cast it to bfloat16.

        Raises:
            ValueError, TypeError: it does not fit. Nothing has been changed.
        """
        # As the last hook before torch's own loading it sees what the hooks of the user made of the state_dict.
        handle = self.register_load_state_dict_pre_hook(lambda optimizer, saved: fit(optimizer.param_groups, saved))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()


def _treatment(group: dict[str, Any]) -> tuple[Method, Update]:
    method = get_info(group["method"])
    return method, method.update if method.update_for is None else method.update_for(group)


def _sorting(group: dict[str, Any]) -> tuple[Any, ...]:
    """All of a parameter group, beside its tensors, that decides how these are named, sorted and by what stepped."""
    method, update = _treatment(group)
    names = tuple(group.get("param_names") or ())
    return method, update, method.per_unit(group), method.feeds_clipped(group), names, len(group["params"])


def _named(params: Any, names: list[str] | None, start: int) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) pairs. Nameless parameters are numbered.

    Raises:
        TypeError: a set (whose order would change between runs), or a parameter that is not real and floating.
    """
    if isinstance(params, set):
        raise TypeError("parameters must come in an ordered collection, got a set")
    entries = [params] if isinstance(params, Tensor) else list(params)
    if names is not None:
        entries = list(zip(names, entries, strict=True))
    pairs = []
    for number, entry in enumerate(entries, start):
        pair = entry if isinstance(entry, tuple) else (f"parameter_{number}", entry)
        if not isinstance(pair[1], Tensor) or not pair[1].is_floating_point():
            raise TypeError(f"{pair[0]}: parameters must be real floating-point tensors, got {type(pair[1]).__name__}")
        pairs.append(pair)
    return pairs
