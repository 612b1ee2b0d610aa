"""Lightning's trainer from the configuration: what a run sets itself, where its processes are, which devices exist."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from lightning_fabric.plugins import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment

from ranker import launched
from ranker.errors import UserError
from ranker.runs.run_folder import RunFolder
from ranker.training import lean_loop
from ranker.training.lightning_private import leave_signals
from ranker.training.table_checkpoints import DurableCheckpointIO

# Arguments of Lightning's Trainer that a run sets itself, and the options for what they do.
INSTEAD = {
    "max_epochs": "use train.epochs",
    "max_steps": "use train.max_steps",
    "limit_val_batches": "use data.eval_max_rows, or train.eval_every=0 for none",
    "val_check_interval": "use train.eval_every",
    "check_val_every_n_epoch": "use train.eval_every",
    "callbacks": "use +callbacks.NAME._target_=CLASS",
    "logger": "use logger=NAME",
    "default_root_dir": "use hydra.run.dir",
}


def make_trainer(cfg: DictConfig, folder: RunFolder, callbacks: list[Callback], loggers: list[Logger]) -> pl.Trainer:
    """The trainer of a run.

    Raises:
        UserError: an option of the trainer is the run's own, wrong, or does not fit the launcher.
    """
    _quiet_lightning()
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "max_steps": cfg.train.max_steps,
        "limit_val_batches": 1.0 if cfg.train.eval_every else 0,
        # Counted in batches, whatever the (unknown) number of batches in the epoch.
        "val_check_interval": cfg.train.eval_every * cfg.trainer.accumulate_grad_batches or None,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "callbacks": callbacks,
        "logger": loggers,
        "default_root_dir": str(folder.path),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    if SLURMEnvironment.detect() and "plugins" not in cfg.trainer:
        settings["plugins"] = [SLURMEnvironment(auto_requeue=False)]  # Lightning saves in the middle of a step
    for name in settings:
        if name in cfg.trainer:
            raise UserError(f"trainer.{name} is set by this project; {INSTEAD.get(name, 'leave it out')}")
    try:
        trainer: pl.Trainer = instantiate(cfg.trainer, **settings, **_places(cfg), _convert_="all")
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"trainer: {' '.join(str(cause).split())}") from error
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user's own stays
        trainer.strategy.checkpoint_io = DurableCheckpointIO(
            rows_above=OmegaConf.select(cfg, "train.checkpoint_rows_above", default=0),  # missing in old runs
            full_share=OmegaConf.select(cfg, "train.checkpoint_full_share", default=0.25),
        )
    leave_signals(trainer)
    lean_loop.use(trainer)
    return trainer


def check_devices(cfg: DictConfig) -> None:
    """Refuses devices that do not exist, before anything is read or started."""
    asked, accelerator = cfg.trainer.devices, cfg.trainer.accelerator
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and gpus == 0:
        raise UserError("trainer: no GPU is visible to torch; use trainer=cpu, or install a CUDA build of torch")
    if isinstance(asked, int) and accelerator in ("gpu", "cuda", "auto") and 0 < gpus < asked:
        raise UserError(f"trainer.devices is {asked}, but there are {gpus} GPUs; use trainer.devices={gpus}")
    if isinstance(asked, int) and asked > 1 and accelerator == "auto" and gpus == 0:
        raise UserError(
            f"trainer.devices is {asked}, but there is no GPU; add trainer.accelerator=cpu for {asked} CPU processes"
        )
    found = launched.launch()
    ranks = found.size if found is not None else gpus if asked in ("auto", -1) else asked
    if accelerator != "cpu" and gpus and ranks > 1 and OmegaConf.select(cfg, "model.net.sparse_embeddings"):
        raise UserError(
            "model.net.sparse_embeddings=true: NCCL cannot exchange sparse gradients between GPUs; use false, or "
            "sharded tables (docs/scale.md)"
        )
    if isinstance(asked, int) and asked < 1 and asked != -1:
        raise UserError(f"trainer.devices must be 1 or more (or -1 or auto for all), got {asked}")


def _places(cfg: DictConfig) -> dict[str, int]:
    """Machines and processes of each, where torchrun or srun has started them.

    Their numbers are the launcher's, so that a command need not repeat them, and a restart on fewer machines can do.

    Raises:
        UserError: the configuration says something else.
    """
    found = launched.launch()
    alone = cfg.trainer.get("strategy", "auto") == "auto"
    if found is None or (alone and found.size == 1):
        return {}
    asked = {"devices": found.local_size, "num_nodes": found.nodes}
    started = f"{_counted(found.size, 'process', 'processes')} on {_counted(found.nodes, 'machine', 'machines')}"
    if alone:
        raise UserError(
            f"{found.program} has started {found.size} processes, and trainer.strategy=auto trains in one; "
            "add trainer=ddp"
        )
    for name, value in asked.items():
        given = cfg.trainer.get(name, "auto")
        if given != value and given not in (("auto", -1) if name == "devices" else ("auto", 1)):
            raise UserError(
                f"trainer.{name} is {given}, but {found.program} has started {started}; leave it out, or set "
                f"trainer.devices={found.local_size} trainer.num_nodes={found.nodes}"
            )
    return asked


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _quiet_lightning() -> None:
    """Silences messages of Lightning that a user of this project cannot act on."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 with torch 2.13
        ".*torch.distributed.nn.functional.all_gather is deprecated.*",  # the same
        # conf/trainer/ddp.yaml: each rank keeps its own statistics, and for that torch 2.13 has nothing else yet.
        ".*`broadcast_buffers` is deprecated.*",
        ".*does not have many workers.*",  # our loaders prefetch in threads
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # of the tables; they go into torch.cat at once
        ".*Checkpoint directory .* exists and is not empty.*",  # expected when a run resumes
    ):
        warnings.filterwarnings("ignore", message=message)
