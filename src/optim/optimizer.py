"""The optimizer: torch.optim.Optimizer around "choose sigma, then step"."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from optim import stats
from optim.batch import Backend, Batch, all_finite, choose_sigma, make_batches
from optim.distributed import local_tensor
from optim.eager import EAGER
from optim.hyperparameters import SHARED, check_names
from optim.native.kernels import NATIVE, is_available
from optim.pages import ask_for_huge_pages
from optim.plan import Plan
from optim.registry import get_info
from optim.work import Work, make_work

SKIPPED = "skipped_steps"
WARNED = "warned_still"
_SHARED = {spec.name: spec for spec in SHARED}
_INTERNAL = {"params", "param_names", "method", "initial_lr", SKIPPED}


class SigmaOptimizer(torch.optim.Optimizer):
    """w <- w - lr * sigma * r, every parameter group with its own method and hyperparameters.

    Made by `build_optimizer`, which documents the arguments. All configuration lives in `param_groups` and all state
    in `state`, as tensors, numbers and strings, so that checkpoints, copies and pickles need nothing special.

    Args:
        params: What torch.optim takes; group dicts may hold a `method` and any of its hyperparameters.
        method: The method of groups that name none.
        defaults: Its hyperparameters, complete.
        on_nonfinite: "propagate", "skip" or "raise".
        collect_stats: Whether `clip_stats()` has anything to report.
        backend: "auto", "native" or "eager".

    Raises:
        ValueError, TypeError: as `build_optimizer`.
    """

    _plan: Plan | None = None  # what the last step did; of no use to copies and pickles, which come without

    def __init__(
        self,
        params: Iterable[Any],
        *,
        method: str,
        defaults: Mapping[str, Any],
        on_nonfinite: str | None = None,
        collect_stats: bool | None = None,
        backend: str | None = None,
    ) -> None:
        given = {"on_nonfinite": on_nonfinite, "collect_stats": collect_stats, "backend": backend}
        shared = {
            name: spec.check(spec.default if given[name] is None else given[name], method)
            for name, spec in _SHARED.items()
        }
        if shared["backend"] == "native" and not is_available():
            raise ValueError(f"{method}: backend 'native' needs a C compiler and found none; use 'auto' or 'eager'")
        super().__init__(params, {"method": method, **defaults, **shared, WARNED: False})

    @property
    def collect_stats(self) -> bool:
        """Whether `clip_stats()` is kept; may be switched at any time."""
        return bool(self.defaults["collect_stats"])

    @collect_stats.setter
    def collect_stats(self, value: bool) -> None:
        self.defaults["collect_stats"] = _SHARED["collect_stats"].check(value, "optimizer")

    @property
    def backends(self) -> tuple[Backend, ...]:
        """What steps the tensors, in order of preference."""
        return {"auto": (NATIVE, EAGER), "native": (NATIVE, EAGER), "eager": (EAGER,)}[self.defaults["backend"]]

    @property
    def skipped_steps(self) -> int:
        """How many steps `on_nonfinite="skip"` left out. Reading it waits for the device."""
        return int(sum(group[SKIPPED] for group in self.param_groups if SKIPPED in group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with a method and hyperparameters of their own; what is missing comes from the default method.

        Raises:
            TypeError: an unknown hyperparameter, or a parameter that is not real and floating.
            ValueError: a value out of range, or a parameter that another group has.
        """
        group = dict(param_group)
        method = get_info(group.setdefault("method", self.defaults["method"]))
        where = f"group {len(self.param_groups)} ({method.name})"
        given = {name: value for name, value in group.items() if name not in _INTERNAL}
        for name in _SHARED:
            if name in given:
                raise TypeError(f"{where}: {name} belongs to the optimizer as a whole; pass it to build_optimizer")
        inherited = self.defaults if method.name == self.defaults["method"] else {"lr": self.defaults["lr"]}
        known = method.all_hyperparameters
        check_names(given, known, where)
        if "preset" in given:
            inherited = {"lr": self.defaults["lr"]}
        settings = method.resolve({name: inherited[name] for name in known if name in inherited} | given, where)
        group["params"] = _named(group["params"], group.pop("param_names", None), start=self._parameter_count())
        super().add_param_group({**group, **settings})
        added = self.param_groups[-1]
        for name in self.defaults:  # torch copies every default into every group
            if name not in settings and name != "method":
                del added[name]

    def _parameter_count(self) -> int:
        return sum(len(group["params"]) for group in self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step from the gradients at hand; never waits for the device (but for on_nonfinite="raise").

        Args:
            closure: Recomputes the loss and the gradients, and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            FloatingPointError: a gradient is not finite and on_nonfinite="raise"; nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._take_plan()
        batches = make_batches(self.gather(), self.backends) if plan is None else plan.batches
        if not batches:
            return loss
        for batch in batches:
            choose_sigma(batch)
        ok = self._check_finite(batches)
        for batch in batches:
            go = ok.get(batch.device)
            if self.collect_stats:
                reasons = stats.explain(batch)  # while the weights are still those that sigma was chosen for
                moved = batch.backend.apply(batch, go, measure=True)
                stats.record(batch, reasons, moved, self.state, go)
            else:
                batch.backend.apply(batch, go, measure=False)
        if not torch.compiler.is_compiling() and (plan := plan or Plan.of(self, batches)) is not None:
            self._plan = plan.rest()
        return loss

    def _take_plan(self) -> Plan | None:
        """Return the plan of the step before where it holds for this one.

        It is put back when the step is over: one that ended with an error would keep gradients from being freed.
        """
        if torch.compiler.is_compiling():
            return None
        plan, self._plan = self._plan, None
        return plan if plan is not None and plan.renew(self) else None

    def gather(self, *, keep_state: bool = True, names: Collection[str] | None = None) -> list[Work]:
        """Return what a step has to do: every parameter with a gradient, in its local, dense form.

        Args:
            keep_state: Whether a fresh parameter keeps the state it is given; False changes nothing at all.
            names: Only parameters of these names; None for all.
        """
        works, native = [], NATIVE in self.backends
        for group in self.param_groups:
            method = get_info(group["method"])
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if param.grad is None or (names is not None and name not in names):
                    continue
                state = {key: value for key, value in self.state.get(param, {}).items() if key != stats.STATE_KEY}
                if not state:
                    state = method.update.init(param.detach(), group)
                    if keep_state:
                        self.state[param].update(state)
                works.append(make_work(name, param, method, group, state, native=native))
        return works

    def _check_finite(self, batches: list[Batch]) -> dict[torch.device, Tensor]:
        """Return by device whether to go on; empty where nobody asked."""
        policy = self.defaults["on_nonfinite"]
        if policy == "propagate":
            return {}
        ok = all_finite(batches)
        if policy == "raise":
            if not all(ok.values()):
                names = [work.name for batch in batches for work in batch.works if not work.is_finite()]
                raise FloatingPointError(f"gradient of {', '.join(names) or 'another rank'} is not finite")
            return {}
        counter = self.param_groups[0]
        first = next(iter(ok.values()))
        if SKIPPED not in counter:
            counter[SKIPPED] = torch.zeros((), dtype=torch.long, device=first.device)
        counter[SKIPPED].add_(first.logical_not())  # in place: a CUDA graph knows tensors by their memory
        return ok

    def clip_stats(self) -> dict[str, stats.ClipStats]:
        """Return by parameter name what clipping did; empty where collect_stats is off.

        Reading waits for the device. See `ClipStats` for the fields.

        Warns:
            UserWarning: once, when a tensor is held still by weights of 0 and a tiny lambda_abs.
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

        Copies, so that the steps to come leave them alone. Nothing waits until a number is read.
        """
        return stats.last_step(self.param_groups, self.state) if self.collect_stats else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict; torch casts state to the parameter's dtype, which would lose float32 state of bfloat16.

        Raises:
            ValueError: the groups do not fit.
        """
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    if self.state[param][name].dtype != value.dtype:
                        self.state[param][name] = value.to(device=local_tensor(param).device, copy=True)
                    ask_for_huge_pages(self.state[param][name])


def _named(params: Any, names: list[str] | None, start: int) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) pairs; nameless parameters are counted.

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
