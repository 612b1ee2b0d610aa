"""Every parameter with a gradient in one dense, local form: touched rows of sparse gradients, shards of DTensors.

A sparse gradient is coalesced once and becomes the touched rows of its table. A DTensor becomes its local shard and the
process groups over which a reduction must be combined. The rest of the package sees dense tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.registry import Coordinates, Direction, Method, Settings, Update

ShardGroups = tuple[tuple["dist.ProcessGroup", int], ...]
"""(process group, dimension of the tensor that is split over it) for every mesh dimension that shards a tensor."""


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor, without importing torch.distributed.tensor (which takes a second)."""
    if type(tensor) is nn.Parameter or type(tensor) is Tensor:
        return False
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def named_params(param_groups: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield (group, name, parameter) for every parameter; a name that comes again is numbered: `weight#2`.

    Names are for reports. Where a group has none, or not as many as parameters (torch's ZeroRedundancyOptimizer and
    `param_groups[0]["params"].append` leave it so), parameters are called by their position: `parameter_7`.
    """
    seen: dict[str, int] = {}
    start = 0
    for group in param_groups:
        params = group["params"]
        names = group.get("param_names") or ()
        if len(names) != len(params):
            names = [f"parameter_{number}" for number in range(start, start + len(params))]
        for name, param in zip(names, params, strict=True):
            times = seen[name] = seen.get(name, 0) + 1
            yield group, name if times == 1 else f"{name}#{times}", param
        start += len(params)


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that may be written to later, also where this step runs under torch.inference_mode."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this rank. It shares the tensor's memory."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _local_gradient(param: Tensor) -> Tensor:
    """Return the local part of the gradient, sharded as the parameter is."""
    grad = param.grad
    assert grad is not None
    if is_dtensor(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local_tensor(grad)


def shard_groups(param: Tensor) -> ShardGroups:
    """Return the process groups that split a parameter; empty for a plain or replicated one."""
    if not is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return tuple(
        (mesh.get_group(number), placement.dim)
        for number, placement in enumerate(placements)
        if hasattr(placement, "dim") and mesh.size(number) > 1
    )


def combine_max(values: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Return the maximum over ranks of non-negative values. NaN on any rank gives NaN on all.

    The maximum of a collective does not define what it makes of NaN, so a NaN flag is reduced beside the values.
    """
    if not groups:
        return values
    missing = values.isnan()
    both = torch.stack([values.masked_fill(missing, 0.0), missing.to(values.dtype)])
    for group in groups:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return both[0].masked_fill(both[1] > 0, torch.nan)


def combine_norm(values: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Return the 2-norm over ranks of the parts' 2-norms."""
    if not groups:
        return values
    squares = values.double().square()  # the square of a float32 norm may leave the range of float32
    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares.sqrt().to(values.dtype)


@dataclass(slots=True)
class LocalParam:
    """One parameter in one step.

    Attributes:
        name: The parameter's name.
        param: The parameter, as the user holds it.
        method: How it is treated.
        update: The method's update under these settings.
        settings: Its parameter group.
        weight: w: the parameter, its local shard, or a copy of its touched rows.
        grad: g, as autograd left it; same shape as `weight`.
        state: The update's state, in the same form as `weight`. Counts are 0-d.
        rows: Indices of the touched rows in `param`; None for a dense gradient.
        tables: For a sparse gradient: the tensors that hold all rows, and the copies of the touched ones.
        shard_groups: Process groups that hold the other shards of this tensor, with the dimension they split.
        unit_dims: The dimensions a reduction runs over where there is one sigma per row or unit; None for the whole
            tensor.
    """

    name: str
    param: Tensor
    method: Method
    update: Update
    settings: dict[str, Any]
    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    rows: Tensor | None
    tables: list[tuple[Tensor, Tensor]]
    shard_groups: ShardGroups
    unit_dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        several = has_several_sigmas(self.method, self.settings, self.weight.ndim, sparse=self.rows is not None)
        self.unit_dims = tuple(range(1, self.weight.ndim)) if several else None

    def is_finite(self) -> Tensor:
        """Return whether all of the local gradient is finite, as a 0-d bool on its device.

        For an update that keeps state its square must be finite, too: an accumulator of infinity holds its coordinate
        still from then on. In float32 that is a gradient of 1.8e19.
        """
        if self.grad.numel() == 0:
            return torch.ones((), dtype=torch.bool, device=self.grad.device)
        # One vectorised pass, which NaN survives. The infinity norm is thirty times slower on the CPU.
        least, largest = torch.aminmax(self.grad)
        size = torch.maximum(-least, largest).to(torch.promote_types(self.weight.dtype, torch.float32))
        return (size.square() if self.state else size).isfinite()

    def write_back(self) -> None:
        """Copy touched rows back into their tables. Dense tensors were written in place."""
        if self.rows is not None:
            for table, copy in self.tables:
                table.index_copy_(0, self.rows, copy)


def has_several_sigmas(method: Method, settings: Settings, ndim: int, *, sparse: bool) -> bool:
    """Whether a tensor has one sigma per row or output unit, not one for the whole tensor."""
    if method.sigma is None:
        return False
    return (sparse and settings["sparse_sigma"] == "row") or (ndim > 1 and method.per_unit(settings))


def make_local(
    name: str, param: Tensor, method: Method, update: Update, settings: dict[str, Any], state: dict[str, Tensor]
) -> LocalParam:
    """Bring one parameter with a gradient to its dense, local form.

    Raises:
        ValueError: a sparse gradient with coupled weight decay (which would touch every row) or sparse in more than
            its first dimension; a gradient or a state of another shape than the parameter.
        IndexError: a sparse gradient has a row outside of its table.
    """
    sharding: ShardGroups = ()
    if is_dtensor(param):
        sharding = shard_groups(param)
        grad, weight = _local_gradient(param), local_tensor(param)
        state = {key: local_tensor(value) for key, value in state.items()}
    else:
        assert param.grad is not None, "only parameters with a gradient are stepped"
        grad, weight = param.grad, param.detach()
    rows, tables = None, []
    _check_shapes(name, weight, grad, state)
    if grad.is_sparse:
        if settings["weight_decay"]:
            raise ValueError(
                f"{name}: weight_decay is not defined for sparse gradients; put the table in its own group"
            )
        grad = grad.coalesce()
        if grad.sparse_dim() != 1:
            raise ValueError(f"{name}: gradients must be sparse by rows, got {grad.sparse_dim()} sparse dimensions")
        rows, grad = grad.indices()[0], grad.values()
        whole, weight = weight, weight.index_select(0, rows)
        touched = {key: value.index_select(0, rows) if value.ndim else value for key, value in state.items()}
        tables = [(whole, weight), *((state[key], copy) for key, copy in touched.items() if copy.ndim)]
        state = touched
    return LocalParam(name, param, method, update, settings, weight, grad, state, rows, tables, sharding)


def _check_shapes(name: str, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    """Refuse what the C kernels would read or write beyond its end."""
    shape = weight.shape
    if grad.shape != shape:
        raise ValueError(f"{name}: the gradient has shape {tuple(grad.shape)}, the parameter {tuple(shape)}")
    for key, value in state.items():
        if value.ndim and value.shape != shape:
            raise ValueError(
                f"{name}: state {key!r} has shape {tuple(value.shape)}, the parameter {tuple(shape)}; "
                "delete optimizer.state[parameter] after changing its size"
            )


@dataclass(slots=True)
class Piece:
    """Part of a LocalParam, small enough to stay in cache: views, flattened where there is more than one."""

    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]

    def effective(self, update: Update, settings: Settings) -> tuple[Tensor, Tensor]:
        """Return weight and gradient in the dtype of the computation, with sign and coupled decay applied."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, grad = self.weight.to(dtype), self.grad.to(dtype)
        if settings["maximize"]:
            grad = -grad
        if coupled_decay(settings) and not decays_update(update):
            grad = grad.add(weight, alpha=settings["weight_decay"])
        return weight, grad

    def direction(self, weight: Tensor, grad: Tensor, update: Update, settings: Settings) -> Direction:
        """Return r for what `effective` returned."""
        direction = update.direction(grad, self.state, settings)
        if coupled_decay(settings) and decays_update(update):
            return Direction(direction.update.add(weight, alpha=settings["weight_decay"]), None)
        return direction

    def coordinates(self, update: Update, settings: Settings) -> Coordinates:
        """Compute w, g, r."""
        weight, grad = self.effective(update, settings)
        return Coordinates(weight, grad, *self.direction(weight, grad, update, settings))


def coupled_decay(settings: Settings) -> float:
    """Return the weight decay that joins the gradient or r; 0 where it is applied to the weight itself."""
    return 0.0 if settings["decoupled_weight_decay"] else settings["weight_decay"]


def decays_update(update: Update) -> bool:
    """Whether coupled weight decay is added to r, not to g."""
    return getattr(update, "decays_update", False)


CHUNK = 1 << 16
"""Coordinates in a piece on the CPU: the temporaries of a float32 piece fit a 2 MiB cache. The C code uses the same."""


def pieces(local: LocalParam) -> Iterator[Piece]:
    """Cut a tensor into pieces. One piece where cutting does not pay or sigma needs whole rows."""
    tensors = [local.weight, local.grad, *(value for value in local.state.values() if value.ndim)]
    whole = (
        local.weight.numel() <= CHUNK
        or local.weight.device.type != "cpu"
        or torch.compiler.is_compiling()
        or local.unit_dims is not None
        or not all(tensor.is_contiguous() for tensor in tensors)
    )
    if whole:
        yield Piece(local.weight, local.grad, local.state)
        return
    elementwise = [key for key, value in local.state.items() if value.ndim]
    for weight, grad, *state in zip(*(torch.split(tensor.view(-1), CHUNK) for tensor in tensors), strict=True):
        yield Piece(weight, grad, {**local.state, **dict(zip(elementwise, state, strict=True))})
