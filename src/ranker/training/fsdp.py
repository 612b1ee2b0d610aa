"""Training with sharded weights: each rank keeps a part of every parameter and of its optimizer state (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ranker.errors import UserError
from ranker.models.admission import admission_of
from ranker.training.ddp import Watched

LEAST = 65_536  # parameters of a linear layer that is gathered alone; smaller ones come together

# What would look at a part of the weights as if it were the whole: an option, and the value that switches it off.
OFF = {
    "callbacks.early_signs.every": 0,
    "callbacks.snapshots.every": 0,
    "callbacks.capsules": None,
}
# What a run may ask for, and cannot have: an option, what it must be, and why.
REFUSED = {
    "callbacks.rollback.tries": (0, "goes back to a snapshot of whole weights"),
    "callbacks.early_stop.patience": (0, "goes back to a snapshot of whole weights"),
    "callbacks.sharpness.every": (0, "multiplies with a Hessian of whole weights"),
    "callbacks.histograms.every": (0, "counts whole weights"),
    "train.average_decay": (0, "averages whole weights"),
    "train.compile": (False, "is not tested with it"),
    "model.net.sparse_embeddings": (False, "makes gradients that cannot be sharded"),
    "embeddings.name": ("local", "has tables that are sharded already"),
    "warm_start.path": (None, "takes over whole weights; one rank or trainer=ddp can do it"),
}


class WatchedFSDP(Watched, ModelParallelStrategy):
    """Fully sharded data parallel training (FSDP2), with a watch over the ranks. Arguments as of ``Watched``.

    Each rank keeps 1/n of every parameter along its first dimension, as a DTensor, and of the optimizer's state. A
    layer is gathered when it is used, and its gradients are averaged and scattered. The numbers are those of DDP to
    rounding: the loss is normalised by the labels of all ranks, and ``optim`` takes its norms, maxima and minima over
    all shards. Checkpoints are those of any other run: rank 0 writes whole tensors. So a run may go on with another
    strategy or with another number of ranks.

    Source: Zhao et al. (2023), PyTorch FSDP, arXiv 2304.11277; ``torch.distributed.fsdp.fully_shard``.
    """

    def __init__(self, *, timeout_seconds: float = 600.0, **options: Any) -> None:
        super().__init__(
            timeout_seconds=timeout_seconds, save_distributed_checkpoint=False, tensor_parallel_size=1, **options
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning reads the checkpoint, and this class shards it."""
        return True

    def setup_environment(self) -> None:
        """Every rank has rows of its own."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _setup_distributed(self) -> None:
        self.set_world_ranks()
        self._start_watch()
        super()._setup_distributed()
        self._join_watch()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, with whole tensors."""
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, with whole tensors."""
        return whole(Strategy.optimizer_state(self, optimizer))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Gives each rank its part of a checkpoint's weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        saved = {name: _as(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(saved, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives each rank its part of a checkpoint's optimizer state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _as(value, parameters[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Rank 0 writes one file."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Each rank reads the file."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the parameters of a net over a mesh, in place. Does nothing with a net that is sharded already.

    The tables and each large linear layer are gathered alone, when they are used; what is small, together.
    """
    if isinstance(net, FSDPModule):
        return
    for name, module in net.named_modules():
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if name == "embeddings" or (isinstance(module, nn.Linear) and size >= LEAST):
            fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(net.get_submodule("embeddings"), "pieces")  # what a ranker calls, in place of forward
    fully_shard(net, mesh=mesh)


def whole(state: Any) -> Any:
    """A state with whole tensors in place of shards. All ranks must call; rank 0 alone keeps the tensors."""
    if isinstance(state, DTensor):
        found = state.full_tensor()
        return found.cpu() if torch.distributed.get_rank() == 0 else found.new_empty(0)
    if isinstance(state, Mapping):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(whole, state))
    return state


def _as(value: Any, own: Any) -> Any:
    """A whole tensor as shards like those of a tensor of this run; anything else as it is."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return value


def with_what_works(cfg: DictConfig, net: nn.Module | None = None) -> tuple[DictConfig, list[str]]:
    """A configuration without what looks at whole weights, for the callbacks of a run with sharded ones.

    Args:
        cfg: the configuration.
        net: the model, before it is sharded.

    Returns:
        The configuration, and the options that were switched off.

    Raises:
        UserError: it asks for something that sharded weights do not allow.
    """
    for name, (needed, why) in REFUSED.items():
        given = OmegaConf.select(cfg, name, default=None)
        if given is not None and given != needed:
            raise UserError(f"{name}={given} {why}, which trainer=fsdp does not have; leave it out, or use trainer=ddp")
    if net is not None and admission_of(net) is not None:
        raise UserError("the schema admits ids by count, which changes rows of whole tables; use trainer=ddp")
    if str(cfg.trainer.precision) not in ("32", "32-true", "bf16-mixed"):
        raise UserError(f"trainer.precision={cfg.trainer.precision} is not tested with trainer=fsdp; use bf16-mixed")
    reduced, names = cfg.copy(), []
    with open_dict(reduced):
        for name, off in OFF.items():
            if OmegaConf.select(reduced, name, default=None) not in (None, off):
                OmegaConf.update(reduced, name, off)
                names.append(name)
    return reduced, names
