"""Clippy in PyTorch Lightning.

`configure_optimizers` returns the optimizer, and a callback logs how much was clipped. Lightning's own
`gradient_clip_val` stays off: Clippy bounds the step itself, after Adagrad has scaled it. Runs in about five seconds,
most of them imports: `python examples/lightning_trainer.py`.
"""

# %% [markdown]
# ## The module
#
# An ordinary `LightningModule`. The warm-up is a schedule per step (`"interval": "step"`); Lightning's default is per
# epoch.

# %%
from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import optim


class Ranker(pl.LightningModule):
    """A table of items and dense features, a shared bottom, two tasks: click and watch time."""

    def __init__(self, items: int = 200, dense: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.items = nn.Embedding(items, 8)
        self.bottom = nn.Sequential(nn.Linear(8 + dense, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.Linear(64, 2)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the sum of the tasks' losses."""
        items, dense, labels = batch
        outputs = self.heads(self.bottom(torch.cat([self.items(items), dense], dim=1)))
        click = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels[:, 0])
        loss = click + nn.functional.mse_loss(outputs[:, 1], labels[:, 1])
        self.log("train/loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """Return Clippy for the layers, Adagrad for the table, and a warm-up over 20 steps."""
        optimizer = optim.build_optimizer(
            "clippy",
            self,
            lr=self.lr,
            initial_accumulator_value=1e-6,
            embedding={"method": "adagrad", "initial_accumulator_value": 1e-6},
            collect_stats=True,
        )
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


# %% [markdown]
# ## A callback for sigma
#
# `last_step()` has sigma of the last step by parameter, as tensors on the device: logging them does not wait for it.


# %%
class LogSigma(pl.Callback):
    """Logs sigma of every tensor every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.lowest: dict[str, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log, and keep the lowest sigma of each tensor."""
        if trainer.global_step % self.every:
            return
        for name, told in trainer.optimizers[0].last_step().items():  # type: ignore[attr-defined]
            pl_module.log(f"sigma/{name}", told.sigma)
            self.lowest[name] = min(self.lowest.get(name, 1.0), float(told.sigma))


# %% [markdown]
# ## Training
#
# The rows are in time order, so the loader does not shuffle.

# %%
torch.manual_seed(0)
rows = 256 * 120
items, dense = torch.randint(200, (rows,)), torch.randn(rows, 8)
score = dense[:, 0] + 0.5 * torch.cos(items.float())
labels = torch.stack([(score > 0).float(), score], dim=1)
loader = DataLoader(TensorDataset(items, dense, labels), batch_size=256)

sigma = LogSigma(every=10)
trainer = pl.Trainer(
    max_epochs=1,
    accelerator="cpu",
    logger=False,
    callbacks=[sigma],
    enable_checkpointing=False,
    enable_model_summary=False,
    enable_progress_bar=False,
)
model = Ranker()
trainer.fit(model, loader)
print(f"loss: {model.losses[0]:.2f} at the start, {sum(model.losses[-20:]) / 20:.2f} over the last 20 steps")
for name, lowest in sigma.lowest.items():
    print(f"{name:16} lowest sigma {lowest:.3f}")

# %% [markdown]
# Expect a loss that falls from about 1.9 to about 0.13, and sigmas below 1 for the layers: at this rate their steps
# are shortened. Checkpoints of Lightning hold the optimizer's state, and `trainer.fit(ckpt_path=...)` restores it.
