"""All uses of private attributes of Lightning and of torch in training. ``test_lightning_private.py`` checks each.

The versions that are known to work are bounded in pyproject.toml. When an upgrade breaks one of these functions, the
test names it, and only this file must change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.trainer import call
from pytorch_lightning.trainer.states import TrainerFn, TrainerStatus
from torch import nn


def refetch(trainer: pl.Trainer) -> None:
    """Drops the batches that Lightning has fetched ahead, and fetches again from the data loader.

    Private, because Lightning has no public way to move within an epoch: its prefetcher holds one batch, and the epoch
    loop has already noted whether that batch is the last one. A rollback moves the loader, so both are out of date.
    """
    loop = trainer.fit_loop
    if loop._data_fetcher is not None:
        iter(loop._data_fetcher)
        loop.epoch_loop.batch_progress.is_last_batch = loop._data_fetcher.done


def with_more_batches(checkpoint: dict[str, Any]) -> None:
    """Marks the epoch of a checkpoint as unfinished, so that a resumed run trains on what the loader still has.

    Private, because Lightning restores its progress from these entries alone. A checkpoint of the last batch says that
    the epoch is over, and the resumed run would end without a step, although there are more passes to make now.
    """
    loops = checkpoint["loops"]["fit_loop"]
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    for progress in ("total", "current"):
        loops["epoch_progress"][progress] |= {"processed": 0, "completed": 0}


def leave_signals(trainer: pl.Trainer) -> None:
    """Keeps Lightning from handling signals: ``ranker.stop_signals`` does.

    Private, because Lightning has no option for it. Its handler for SIGTERM sends a broadcast from wherever the program
    is. The other ranks may be in another collective call, so that all wait until the timeout.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def begin_fit(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, checkpoint: Path | None
) -> None:
    """Does what ``trainer.fit`` does up to its first batch, in its order, and makes no loader.

    Private, because Lightning's fit owns the loop over batches. A group of runs has one loop for all of them, and
    hands each batch to ``LeanEpochLoop.begin`` and ``end_of_step_elsewhere`` of every trainer.

    Args:
        trainer: a new trainer with ``LeanEpochLoop``, on one device.
        module: the module.
        data: the data module.
        checkpoint: to go on from.
    """
    trainer.state.fn, trainer.state.status = TrainerFn.FITTING, TrainerStatus.RUNNING
    trainer.training = True
    trainer.strategy._lightning_module = module
    trainer._data_connector.attach_data(module, datamodule=data)
    trainer.strategy.connect(module)
    trainer._callback_connector._attach_model_callbacks()
    trainer._callback_connector._attach_model_logging_functions()
    trainer.strategy.setup_environment()
    call._call_setup_hook(trainer)
    call._call_configure_model(trainer)
    saved = trainer._checkpoint_connector
    saved._restore_modules_and_callbacks(checkpoint, True)
    trainer._logger_connector.reset_results()
    trainer.strategy.setup(trainer)
    call._call_callback_hooks(trainer, "on_fit_start")
    call._call_lightning_module_hook(trainer, "on_fit_start")
    saved.restore_training_state()
    saved.resume_end()
    module.zero_grad()
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    fit.reset()
    module.train()
    call._call_callback_hooks(trainer, "on_train_start")
    call._call_lightning_module_hook(trainer, "on_train_start")
    if not fit.restarted_mid_epoch and not fit.restarted_on_epoch_end:
        if not fit.restarted_on_epoch_start:
            fit.epoch_progress.increment_ready()
        fit.epoch_progress.increment_started()
    epoch.reset()
    for loop in (fit, epoch, epoch.val_loop):
        loop.on_iteration_done()


class _Launcher(_SubprocessScriptLauncher):
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **options: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **options)


def without_observer(strategy: ParallelStrategy) -> None:
    """Gives a strategy a launcher without the thread that kills all ranks, the first one too, when one has failed.

    Private, because Lightning has no option for it. The run would end without a line, a summary or the others' reason.
    """
    old = strategy._launcher
    if type(old) is _SubprocessScriptLauncher:
        strategy._launcher = _Launcher(old.cluster_environment, old.num_processes, old.num_nodes)


def without_anonymous(logger: WandbLogger) -> WandbLogger:
    """A logger that does not pass ``anonymous`` to wandb, which warns of it at each start, whatever its value.

    Private, because Lightning has no public way to leave the argument out.
    """
    logger._wandb_init.pop("anonymous", None)
    return logger


def rewinds(logger: WandbLogger) -> bool:
    """Whether a logger asks wandb to drop what the run had tracked after some step.

    Private, because Lightning has no public way to ask what a logger will give to ``wandb.init``.
    """
    return logger._wandb_init.get("resume_from") is not None


def is_compiled(net: nn.Module) -> bool:
    """Whether ``net.compile()`` was called.

    Private, because torch has no public way to ask. Hooks inside a compiled module do not run on every call, so the
    early signs must know.
    """
    return net._compiled_call_impl is not None
