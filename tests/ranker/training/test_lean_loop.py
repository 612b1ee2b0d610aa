"""The lean loop over batches beside Lightning's own: the same hooks in the same order, numbers and checkpoints.

After an upgrade of Lightning these tests name what has to be changed in ``lean_loop.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_support import LOG, ROWS, Recorder
from ranker.training import lean_loop
from ranker.training.lean_loop import HOOKS, LeanEpochLoop

BATCHES = [LOG.read(i * ROWS, (i + 1) * ROWS).dense_BF for i in range(6)]


class Model(pl.LightningModule):
    """A linear model that logs, has a schedule, and hooks of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Linear(BATCHES[0].shape[1], 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight(batch) - 1.0).square().mean()
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("norm", nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adagrad(self.parameters(), lr=0.1)
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Witness(Callback):
    """Notes every hook of a batch, what it was given and under which name ``log`` would file."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in HOOKS:
            return super().__getattribute__(name)

        def note(trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
            given = [x.tolist() if isinstance(x, torch.Tensor) and x.ndim == 0 else type(x).__name__ for x in args]
            if name == "on_train_batch_end":
                given[0] = args[0]["loss"].item()
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            grads = [None if p.grad is None else p.grad.sum().item() for p in module.parameters()]
            progress = trainer.fit_loop.epoch_loop.state_dict()
            self.seen.append((name, given, module._current_fx_name, trainer.global_step, lr, grads, str(progress)))

        return note

    def on_train_batch_start(self, *_: Any) -> None: ...
    def on_before_zero_grad(self, *_: Any) -> None: ...
    def on_before_backward(self, *_: Any) -> None: ...
    def on_after_backward(self, *_: Any) -> None: ...
    def on_before_optimizer_step(self, *_: Any) -> None: ...
    def on_train_batch_end(self, *_: Any) -> None: ...


class Save(Callback):
    def __init__(self, file: Path, *, at: int) -> None:
        self.file, self.at = file, at

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.file)


class Loader:
    """Begins where a checkpoint was written."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def __iter__(self) -> Any:
        yield from BATCHES[self.start :]


def fitted(
    *callbacks: Callback, lean: bool, start: int = 0, module: pl.LightningModule | None = None, **options: Any
) -> tuple[pl.Trainer, Recorder]:
    recorder, ckpt = Recorder(), options.pop("ckpt_path", None)
    options = {"enable_checkpointing": False, "log_every_n_steps": 2} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=recorder, callbacks=list(callbacks), **quiet, **options
    )
    if lean:
        lean_loop.use(trainer)
    trainer.fit(module or Model(), train_dataloaders=Loader(start), ckpt_path=ckpt, weights_only=True)
    return trainer, recorder


def is_lean(trainer: pl.Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, LeanEpochLoop)
    return loop._step is not None


def test_every_hook_comes_as_in_lightnings_loop_and_sees_the_same() -> None:
    lightning, lean = Witness(), Witness()
    (old, old_rows), (new, new_rows) = fitted(lightning, lean=False), fitted(lean, lean=True)

    assert is_lean(new)
    assert [row[0] for row in lean.seen] == list(HOOKS) * len(BATCHES)
    for ours, theirs in zip(lean.seen, lightning.seen, strict=True):
        assert ours == theirs
    assert new_rows.rows == old_rows.rows
    assert {"loss", "norm"} <= new_rows.rows[1].keys(), "what is logged in hooks reaches the loggers"
    assert {k: float(v) for k, v in new.callback_metrics.items()} == {
        k: float(v) for k, v in old.callback_metrics.items()
    }
    for ours_p, theirs_p in zip(new.lightning_module.parameters(), old.lightning_module.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p)


def test_a_checkpoint_is_lightnings_and_either_loop_goes_on_from_it(tmp_path: Path) -> None:
    whole, _ = fitted(Save(tmp_path / "old.ckpt", at=3), lean=False)
    fitted(Save(tmp_path / "new.ckpt", at=3), lean=True)

    old, new = (torch.load(tmp_path / name, weights_only=True) for name in ("old.ckpt", "new.ckpt"))
    assert new["loops"] == old["loops"]
    assert str(new["optimizer_states"]) == str(old["optimizer_states"])
    assert new["lr_schedulers"] == old["lr_schedulers"]
    for lean in (True, False):
        resumed, _ = fitted(lean=lean, start=3, ckpt_path=tmp_path / "new.ckpt")
        assert resumed.global_step == 6
        for a, b in zip(resumed.lightning_module.parameters(), whole.lightning_module.parameters(), strict=True):
            assert torch.equal(a, b)


class OwnStep(Model):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure)


@pytest.mark.parametrize(
    ("options", "module"),
    [
        ({"accumulate_grad_batches": 2}, Model),
        ({"precision": "bf16-mixed"}, Model),
        ({"profiler": "simple"}, Model),
        ({}, OwnStep),
    ],
)
def test_where_more_is_asked_for_lightnings_own_code_runs(options: dict[str, Any], module: Any) -> None:
    old, _ = fitted(lean=False, module=module(), **options)
    new, _ = fitted(lean=True, module=module(), **options)

    assert "accumulate_grad_batches" in options or not is_lean(new)
    assert new.global_step == old.global_step == (3 if "accumulate_grad_batches" in options else 6)
    for a, b in zip(new.lightning_module.parameters(), old.lightning_module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_that_is_put_in_midway_takes_the_next_step() -> None:
    class Swap(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=0.0)]
            if trainer.global_step >= 3:
                self.weights = [*getattr(self, "weights", []), module.weight.weight.detach().clone()]

    swap = Swap()
    trainer, _ = fitted(swap, lean=True)
    assert trainer.global_step == 6
    assert torch.equal(swap.weights[0], swap.weights[-1]), "a rate of 0 holds the weights still"
