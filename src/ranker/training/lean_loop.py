"""Lightning's loop over training batches without what a run of this project does not use.

Private, as in ``lightning_private.py``: Lightning has no public way to replace its loop. ``test_lean_loop.py`` compares
it with Lightning's own, hook by hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.plugins import Precision
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

# What Lightning calls in a training batch, of callbacks and of the module, in this order.
HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
# Methods of the module that this loop does not call, but does the work of.
_OF_MODULE = (
    "optimizer_step",
    "optimizer_zero_grad",
    "backward",
    "lr_scheduler_step",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
)
_OF_DATA = _OF_MODULE[-2:]
_OF_STRATEGY = ("backward", "batch_to_device", "on_train_batch_start", "post_training_step")


def use(trainer: pl.Trainer) -> None:
    """Gives a trainer this loop. Call it before ``fit``.

    Numbers, checkpoints and the order of hooks stay those of Lightning. Where a trainer does more than one plain step
    per batch (accumulated gradients, mixed precision, a profiler, another strategy), Lightning's own code runs.
    """
    old = trainer.fit_loop.epoch_loop
    if type(old) is _TrainingEpochLoop:
        trainer.fit_loop.epoch_loop = LeanEpochLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)


@dataclass(frozen=True)
class _Step:
    """What a plain training step calls, looked up once.

    Attributes:
        module: the module.
        forward: its training step, through the wrapper of DDP where there is one.
        hooks: of each name in ``HOOKS``, what callbacks and module do there.
        move: of the data module or of the module: puts a batch on a device.
    """

    module: pl.LightningModule
    forward: Callable[[Any, int], Any]
    hooks: dict[str, list[Callable[..., Any]]]
    move: Callable[[Any, torch.device, int], Any]

    @classmethod
    def of(cls, trainer: pl.Trainer, fetcher: _DataFetcher | None) -> _Step | None:
        """The step of a trainer; None where it is not plain."""
        module, strategy = trainer.lightning_module, trainer.strategy
        if not _is_plain(trainer) or isinstance(fetcher, _DataLoaderIterDataFetcher):
            return None
        return cls(
            module=module,
            forward=module.training_step if strategy.model is module else strategy.training_step,
            hooks={name: _hooks(trainer, name) for name in HOOKS},
            move=_mover(trainer).transfer_batch_to_device,
        )

    def call(self, hook: str, *args: Any) -> None:
        """Calls what is behind a hook, under whose name ``LightningModule.log`` files what it is given."""
        if not (found := self.hooks[hook]):
            return
        own = self.module.__dict__  # of a module of torch, setting an attribute costs as much as a small hook
        before, own["_current_fx_name"] = own["_current_fx_name"], hook
        for function in found:
            function(*args)
        own["_current_fx_name"] = before


class LeanEpochLoop(_TrainingEpochLoop):
    """Trains on one batch after another with few calls around the arithmetic.

    Lightning asks every callback at every hook, whether it does something there or not, under a profiler's context and
    with a name that is put together each time; it gathers logged values and looks at signatures. That took a tenth of
    a step of a small model on 256 rows.
    """

    _step: _Step | None = None

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Looks at what the trainer was given."""
        super().on_run_start(data_fetcher)
        self._step = _Step.of(self.trainer, data_fetcher)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Trains on one batch. The first one after a checkpoint is Lightning's."""
        step = self._step
        if step is None or self.restarting or self.trainer.accumulate_grad_batches != 1:
            super().advance(data_fetcher)
            return
        self.val_loop._restarting = False
        trainer = self.trainer
        if trainer.world_size > 1:
            self._broadcast_sigterm_tensor()
        batch, _, _ = next(data_fetcher)
        batch = step.move(batch, trainer.strategy.root_device, 0)
        self.begin(batch, last=data_fetcher.done)
        self.end(batch, self._optimize(step, batch, self.batch_idx))

    def look_up_hooks(self) -> None:
        """Looks at what the trainer was given, where no fetcher gives the batches."""
        self._step = _Step.of(self.trainer, None)

    def call(self, hook: str, *args: Any) -> None:
        """Calls what callbacks and module do at one of ``HOOKS``, with the arguments but trainer and module."""
        assert self._step is not None
        self._step.call(hook, *args)

    def begin(self, batch: Any, *, last: bool) -> None:
        """What comes before the forward pass of a batch.

        Args:
            batch: the batch, on its device.
            last: whether the loader has no other.
        """
        progress = self.batch_progress
        progress.is_last_batch = last
        progress.increment_ready()
        self.trainer._logger_connector.on_batch_start(batch)
        self.call("on_train_batch_start", batch, self.batch_idx)
        progress.increment_started()

    def end(self, batch: Any, loss: Tensor) -> None:
        """What follows the optimizer's step."""
        progress, trainer = self.batch_progress, self.trainer
        progress.increment_processed()
        self._update_learning_rates("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self.call("on_train_batch_end", {"loss": loss}, batch, self.batch_idx)
        results = trainer._results
        assert results is not None
        if results:  # somebody has called ``log``
            trainer._logger_connector.on_batch_end()
        results.batch, results.batch_size = None, None
        progress.increment_completed()
        if results:
            trainer._logger_connector.update_train_step_metrics()

    def end_of_step_elsewhere(self, batch: Any, loss: Tensor) -> None:
        """As ``end``, after a step that somebody else has made; counts it as Lightning does."""
        counts = self.automatic_optimization.optim_progress.optimizer
        for count in (counts.zero_grad, counts.step):
            count.increment_ready()
            count.increment_completed()
        counts.zero_grad.increment_started()
        self.end(batch, loss)
        self._batches_that_stepped += 1

    def _optimize(self, step: _Step, batch: Any, batch_idx: int) -> Tensor:
        """Forward pass, backward pass and the optimizer's step; the loss."""
        counts = self.automatic_optimization.optim_progress.optimizer
        # A rollback may have put another optimizer into the trainer.
        strategy, module, optimizer = self.trainer.strategy, step.module, self.trainer.optimizers[0]

        def closure() -> Tensor:
            with torch.enable_grad():
                module._current_fx_name = "training_step"
                loss = step.forward(batch, batch_idx)
                module._current_fx_name = None
                assert isinstance(loss, Tensor)
                counts.zero_grad.increment_ready()
                step.call("on_before_zero_grad", optimizer)
                counts.zero_grad.increment_started()
                optimizer.zero_grad()
                counts.zero_grad.increment_completed()
                strategy.pre_backward(loss)
                step.call("on_before_backward", loss)
                loss.backward()
                step.call("on_after_backward")
                strategy.post_backward(loss)
            step.call("on_before_optimizer_step", optimizer)
            module.configure_gradient_clipping(
                optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
            )
            return loss.detach()

        counts.step.increment_ready()
        loss = optimizer.step(closure=closure)  # type: ignore[arg-type]
        counts.step.increment_completed()
        assert isinstance(loss, Tensor)
        return loss

    def _update_learning_rates(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Steps the schedules. A step without one costs nothing."""
        if self.trainer.lr_scheduler_configs:
            super()._update_learning_rates(interval, update_plateau_schedulers)


def _is_plain(trainer: pl.Trainer) -> bool:
    """Whether a batch is one forward pass, one backward pass and one step in full precision."""
    module, strategy, precision = trainer.lightning_module, trainer.strategy, trainer.precision_plugin
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(strategy, DDPStrategy):
        base: type = DDPStrategy
        if strategy._model_averager is not None:
            return False
    elif isinstance(strategy, SingleDeviceStrategy):
        base = SingleDeviceStrategy
    else:
        return False
    return (
        module.automatic_optimization
        and not trainer.fit_loop._skip_backward
        and len(trainer.optimizers) == 1
        and type(precision) is Precision
        and isinstance(trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]
        and not any(_own(module, pl.LightningModule, name) for name in _OF_MODULE)
        and not any(_own(strategy, base, name) for name in (*_OF_STRATEGY, "optimizer_step"))
        and not (data is not None and any(_own(data, pl.LightningDataModule, name) for name in _OF_DATA))
    )


def _mover(trainer: pl.Trainer) -> Any:
    """Whose hook moves a batch to the device."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    own = data is not None and _own(data, pl.LightningDataModule, "transfer_batch_to_device")
    return data if own else trainer.lightning_module


def _hooks(trainer: pl.Trainer, name: str) -> list[Callable[..., Any]]:
    """What is to be called at a hook: of callbacks that have it, then of the module."""
    found = [
        _bound(callback, name, trainer, trainer.lightning_module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if _own(callback, Callback, name)
    ]
    module = trainer.lightning_module
    return [*found, getattr(module, name)] if _own(module, pl.LightningModule, name) else found


def _bound(callback: Callback, name: str, trainer: pl.Trainer, module: pl.LightningModule) -> Callable[..., Any]:
    hook = getattr(callback, name)
    return lambda *args: hook(trainer, module, *args)


def _own(thing: object, base: type, name: str) -> bool:
    """Whether an object has a method of its own in the place of one of a base class."""
    return getattr(getattr(thing, name), "__func__", None) is not getattr(base, name)
