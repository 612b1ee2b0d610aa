"""Signs that change before the loss does: gradient norms, activations and dead ReLUs per layer, gradients per task.

All results stay on the device. Nothing waits for the device until a value is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ranker.stability.optimizer_state import adagrad_denominator, group_by_parameter

_MLP_LAYER = re.compile(r"(.*)\.layers\.(\d+)")
_RELUS: frozenset[Callable[..., Any]] = frozenset(
    {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
)


class LayerSigns(NamedTuple):
    """Signs of one parameter tensor between ``backward()`` and ``step()``; scalars on its device.

    Attributes:
        grad_norm: norm2(g).
        grad_over_weight: norm2(g) / norm2(w), which AGC bounds.
        update_max: infinity norm of r = g / (sqrt(G + g^2) + eps), which Clippy bounds; nan for an optimizer without
            an Adagrad accumulator. ``ReportsSteps`` gives the r of other optimizers.
    """

    grad_norm: Tensor
    grad_over_weight: Tensor
    update_max: Tensor


@torch.no_grad()
def layer_signs(
    named_parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, LayerSigns]:
    """Signs by name of parameter, for parameters with a dense gradient.

    Must be called after ``backward()`` and before ``step()``.

    Args:
        named_parameters: parameters to measure; a few layers are enough (``Ranker.layer_names``).
        optimizer: the optimizer whose accumulator, before this step, gives ``update_max``.

    Source: Tang et al. (2023), Figure 4.
    """
    groups = group_by_parameter(optimizer) if optimizer else {}
    signs = {}
    for name, p in named_parameters:
        g = p.grad
        if g is None or g.is_sparse:
            continue
        grad_norm = torch.linalg.vector_norm(g)
        state = optimizer.state.get(p, {}) if optimizer else {}
        denominator = adagrad_denominator(state, groups.get(id(p), {}), g)
        update_max = grad_norm.new_full((), torch.nan)
        if denominator is not None:
            update_max = infinity_norm(torch.div(g, denominator, out=denominator))
        signs[name] = LayerSigns(grad_norm, grad_norm / torch.linalg.vector_norm(p), update_max)
    return signs


class TaskGradients(NamedTuple):
    """The gradients of the tasks on shared parameters.

    Attributes:
        norm_T: norm2 of the weighted gradient per task.
        cosine_TT: cosine between the gradients of two tasks, negative where they conflict; nan where one is 0.
    """

    norm_T: Tensor
    cosine_TT: Tensor


def task_gradients(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> TaskGradients:
    """Norms and cosines of the tasks' gradients on shared parameters.

    One backward pass per task, down to the given parameters only; for the top shared layer it is cheap. The graph is
    kept and ``.grad`` does not change, so the backward pass of the step can follow. The hooks by which DDP averages
    gradients do not run. With several ranks the gradients are averaged here in one all-reduce, so all ranks must call.

    Args:
        losses: one scalar per task with its graph, weighted as in training.
        parameters: shared parameters, such as the weight of the top shared layer.
    """
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)]
            )
        )
    stacked = torch.stack(rows)
    if _several_ranks():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    norm_T = torch.linalg.vector_norm(stacked, dim=1)
    unit = stacked / norm_T[:, None]
    return TaskGradients(norm_T=norm_T, cosine_TT=unit @ unit.T)


class Activations(NamedTuple):
    """The output of one layer; scalars on its device.

    Attributes:
        largest: infinity norm of the output, after the ReLU if there is one; nan where an output is nan.
        dead: share of units that are 0 for all rows; None without a ReLU.
    """

    largest: Tensor
    dead: Tensor | None


class LayerActivations:
    """Measures the activations of chosen layers inside ``with activations.measuring():``; no cost outside.

    One reduction per layer, without waiting for the device. It does not work on a net compiled by torch.compile.

    Args:
        net: the network.
        layers: module names by role, as from ``Ranker.layer_names``. Layer i of an ``MLP`` is measured after its ReLU,
            any other module at its output. A module that is never called is left out, such as the heads, which are
            computed as one product.
    """

    def __init__(self, net: nn.Module, layers: Mapping[str, str]) -> None:
        self._modules = {role: net.get_submodule(name) for role, name in layers.items()}
        self._relus = {}
        for role, name in layers.items():
            match = _MLP_LAYER.fullmatch(name)
            if match is not None and isinstance(self._modules[role], nn.Linear):
                self._relus[role] = f"{match[1]}.{match[2]}"  # its name in ReluPeaks
                del self._modules[role]
        self._peaks = ReluPeaks(net, layers=set(self._relus.values()))
        self._outputs: dict[str, Tensor] = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures the forward pass inside, and discards the previous measurement."""
        self._outputs = {}
        handles = [module.register_forward_hook(self._output_hook(role)) for role, module in self._modules.items()]
        try:
            with self._peaks.measuring():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def compute(self) -> dict[str, Activations]:
        """The last measurement by role, over the rows of all ranks. One all-reduce, so all ranks must call."""
        peaks = self._peaks.peaks
        rows = {role: peaks[name] for role, name in self._relus.items() if name in peaks} | self._outputs
        reduced = max_over_ranks(list(rows.values()))
        return {
            role: Activations(row.amax(), dead_share(row) if role in self._relus else None)
            for role, row in zip(rows, reduced, strict=True)
        }

    def _output_hook(self, role: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._outputs[role] = infinity_norm(output.detach())[None]

        return hook


class ReluPeaks:
    """Measures the largest output over the rows of a batch, per unit, after each ReLU.

    It intercepts calls of the ReLU functions, not modules: most models call ``F.relu`` in a loop over layers. A ReLU is
    named after the module that calls it and a counter, such as ``bottom.0`` and ``bottom.1``.

    It measures only inside ``with peaks.measuring():``; other steps have no cost. One reduction per layer, without
    waiting for the device. It does not work on a net compiled by torch.compile: measure the original net.

    Args:
        net: the network.
        layers: names of the ReLUs to measure; None for all.

    Attributes:
        peaks: the last measurement: [H] on the device, by name.
    """

    def __init__(self, net: nn.Module, *, layers: Collection[str] | None = None) -> None:
        self._net = net
        self._layers = layers
        self._callers: list[str] = []
        self._counts: dict[str, int] = {}
        self.peaks: dict[str, Tensor] = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures the forward passes inside, and discards the previous measurement."""
        self.peaks, self._counts = {}, {}
        handles = []
        for name, module in self._net.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter_hook(name)))
            handles.append(module.register_forward_hook(self._leave_hook, always_call=True))
        try:
            with _ReluInterceptor(self._measure):
                yield
        finally:
            self._callers.clear()
            for handle in handles:
                handle.remove()

    def _enter_hook(self, name: str) -> Callable[[nn.Module, object], None]:
        def hook(_module: nn.Module, _inputs: object) -> None:
            self._callers.append(name)

        return hook

    def _leave_hook(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        if self._callers:
            self._callers.pop()

    @torch.no_grad()
    def _measure(self, output: Tensor) -> None:
        if not self._callers or not output.numel():
            return
        prefix = f"{self._callers[-1]}." if self._callers[-1] else ""
        count = self._counts.get(prefix, 0)
        self._counts[prefix] = count + 1
        name = f"{prefix}{count}"
        if self._layers is None or name in self._layers:
            units = output.detach().flatten(0, -2) if output.ndim > 1 else output.detach()[None]
            self.peaks[name] = units.amax(0)


class _ReluInterceptor(TorchFunctionMode):
    """Passes the output of each ReLU call to a function."""

    def __init__(self, measure: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._measure = measure

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _RELUS:
            self._measure(output)
        return output


def dead_share(peak_H: Tensor) -> Tensor:
    """Share of units whose largest output over the rows is 0, a scalar; a unit with nan is not dead.

    In a batch of few rows, units that are only rarely active count as dead; 1,000 rows are enough.
    """
    return (peak_H <= 0).float().mean()


def infinity_norm(x: Tensor) -> Tensor:
    """Largest absolute value, a scalar; nan where an element is nan. Much faster on the CPU than torch's norm."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def max_over_ranks(rows: list[Tensor]) -> list[Tensor]:
    """Elementwise maximum over the ranks, in one all-reduce in which nan counts as infinite."""
    if not rows or not _several_ranks():
        return rows
    flat = torch.cat([row.float() for row in rows]).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return list(flat.split([row.numel() for row in rows]))


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
