"""All uses of private attributes of Lightning and of torch in training. ``test_lightning_private.py`` checks each.

The versions that are known to work are bounded in pyproject.toml. When an upgrade breaks one of these functions, the
test names it, and only this file must change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
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
