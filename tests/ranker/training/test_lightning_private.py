"""Each private attribute of Lightning and torch that ``lightning_private`` uses is there and means what it meant.

After an upgrade of Lightning or torch these tests name what has to be changed in ``lightning_private.py``.
"""

from __future__ import annotations

import copy
import inspect
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from torch import nn

from ranker.training import lean_loop
from ranker.training.lightning_private import (
    begin_fit,
    is_compiled,
    leave_signals,
    refetch,
    with_more_batches,
    without_anonymous,
    without_observer,
)

CHANGED = "Lightning {} has changed {}: adapt ranker/training/lightning_private.py"


class Numbers(pl.LightningModule):
    """Notes the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(float(batch))
        return self.weight * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Seekable:
    """A loader whose place can be moved."""

    def __init__(self, *, stop: int = 6) -> None:
        self.place, self.stop = 0, stop

    def __iter__(self) -> Any:
        while self.place < self.stop:
            self.place += 1
            yield torch.tensor(float(self.place - 1))


class SaveAtTheEnd(Callback):
    """Saves the state of the last batch, while the batch ends or after training."""

    def __init__(self, file: Path, *, after_training: bool) -> None:
        self.file, self.after_training = file, after_training

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not self.after_training and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            trainer.save_checkpoint(self.file)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        if self.after_training:
            trainer.save_checkpoint(self.file)


class GoBackOnce(Callback):
    def __init__(self, loader: Seekable, *, at: int, to: int, refetching: bool) -> None:
        self.loader, self.at, self.to, self.refetching = loader, at, to, refetching

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            loop = trainer.fit_loop
            assert hasattr(loop, "_data_fetcher"), CHANGED.format(pl.__version__, "trainer.fit_loop._data_fetcher")
            assert hasattr(loop._data_fetcher, "done"), CHANGED.format(pl.__version__, "_data_fetcher.done")
            progress = loop.epoch_loop.batch_progress
            assert hasattr(progress, "is_last_batch"), CHANGED.format(pl.__version__, "batch_progress.is_last_batch")
            self.loader.place = self.to
            if self.refetching:
                refetch(trainer)


def seen(*, at: int, to: int, refetching: bool = True) -> list[float]:
    loader, module = Seekable(), Numbers()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = GoBackOnce(loader, at=at, to=to, refetching=refetching)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[callback], **quiet)
    trainer.fit(module, train_dataloaders=loader)
    return module.seen


def test_after_refetching_the_next_batch_is_the_loaders() -> None:
    assert seen(at=3, to=1) == [0, 1, 2, 1, 2, 3, 4, 5]
    assert seen(at=6, to=4) == [0, 1, 2, 3, 4, 5, 4, 5], "also after the last batch"
    assert seen(at=3, to=6) == [0, 1, 2], "also if nothing is left"


def test_without_refetching_a_batch_in_hand_would_come_first() -> None:
    assert seen(at=3, to=1, refetching=False) == [0, 1, 2, 3, 1, 2, 3, 4, 5], (
        "Lightning no longer holds a batch: refetch may be unnecessary"
    )


@pytest.mark.parametrize("after_training", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_a_checkpoint_of_the_last_batch_goes_on_once_it_is_marked(
    tmp_path: Path, after_training: bool, marked: bool
) -> None:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    file = tmp_path / "last.ckpt"

    def trainer(*callbacks: Callback) -> pl.Trainer:
        return pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=list(callbacks), **quiet)

    save = SaveAtTheEnd(file, after_training=after_training)
    trainer(save).fit(Numbers(), train_dataloaders=Seekable(stop=3))
    checkpoint = torch.load(file, weights_only=True)
    if marked:
        with_more_batches(checkpoint)
    torch.save(checkpoint, file)

    resumed, loader = Numbers(), Seekable()
    loader.place = 3
    trainer().fit(resumed, train_dataloaders=loader, ckpt_path=file, weights_only=True)

    expected = [3, 4, 5] if marked else []
    assert resumed.seen == expected, CHANGED.format(pl.__version__, "what a checkpoint holds of its loops")


def test_lightning_leaves_signals_alone() -> None:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    handlers: list[Any] = []

    class Look(Callback):
        def on_train_start(self, *_: Any) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    for leave in (True, False):
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, callbacks=[Look()], **quiet)
        if leave:
            leave_signals(trainer)
        trainer.fit(Numbers(), train_dataloaders=Seekable())
    assert handlers[0] == before, CHANGED.format(pl.__version__, "trainer._signal_connector")
    assert handlers[1] != before, "Lightning no longer handles SIGTERM: leave_signals may be unnecessary"


def test_the_launcher_of_several_processes_has_no_observer() -> None:
    strategy = DDPStrategy()
    strategy.cluster_environment = LightningEnvironment()
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy._configure_launcher()
    without_observer(strategy)

    launcher = strategy.launcher
    assert isinstance(launcher, _SubprocessScriptLauncher), CHANGED.format(pl.__version__, "DDPStrategy's launcher")
    assert type(launcher) is not _SubprocessScriptLauncher
    assert (launcher.num_processes, launcher.num_nodes) == (2, 1)
    assert "_launch_process_observer" in inspect.getsource(_SubprocessScriptLauncher.launch)
    assert "_call_children_scripts" in inspect.getsource(_SubprocessScriptLauncher.launch)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch, when torch.compile is imported
def test_torch_tells_whether_a_module_is_compiled() -> None:
    net = nn.Linear(1, 1)
    assert hasattr(net, "_compiled_call_impl"), f"torch {torch.__version__} has changed Module._compiled_call_impl"
    assert not is_compiled(net)
    net.compile()
    assert is_compiled(net)


def test_the_argument_of_which_wandb_warns_is_left_out(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=str(tmp_path), mode="offline")

    assert "anonymous" in logger._wandb_init, CHANGED.format(pl.__version__, "WandbLogger._wandb_init")
    assert "anonymous" not in without_anonymous(logger)._wandb_init
    assert logger._wandb_init["resume"] == "allow", "a run is continued under its id"


class FiveNumbers(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return Seekable(stop=5)


class NoteLoops(Callback):
    """Notes the state of the loops while each batch ends."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.noted.append((trainer.global_step, copy.deepcopy(trainer.fit_loop.state_dict())))


def test_batches_after_begin_fit_count_as_those_of_fit(tmp_path: Path) -> None:
    def trainer_of(notes: NoteLoops) -> pl.Trainer:
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[notes], **quiet)
        lean_loop.use(trainer)
        return trainer

    fitted, begun = NoteLoops(), NoteLoops()
    trainer_of(fitted).fit(Numbers(), datamodule=FiveNumbers())

    trainer = trainer_of(begun)
    begin_fit(trainer, Numbers(), FiveNumbers(), None)
    loop: Any = trainer.fit_loop.epoch_loop
    loop.look_up_hooks()
    for number in range(5):
        batch = torch.tensor(float(number))
        loop.begin(batch, last=number == 4)
        loop.end_of_step_elsewhere(batch, torch.zeros(()))

    assert begun.noted == fitted.noted, CHANGED.format(pl.__version__, "what fit does before its first batch")
