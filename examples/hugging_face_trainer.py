"""Clippy in the Hugging Face Trainer.

The Trainer takes the optimizer as an argument, so its model may be any `nn.Module` that returns a loss. One setting
matters: the Trainer clips the norm of all gradients to 1.0 unless `max_grad_norm=0`. Needs `pip install transformers
accelerate`. Runs in about ten seconds, most of them imports: `python examples/hugging_face_trainer.py`.
"""

# %% [markdown]
# ## The model and the data
#
# The Trainer calls the model with the keys of a row as arguments, and takes `loss` from what it returns.

# %%
from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

import optim

ITEMS, DENSE, ROWS, BATCH = 200, 8, 256 * 100, 256


class Ranker(nn.Module):
    """A table of items and dense features, a shared bottom, two tasks: click and watch time."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, 8)
        self.bottom = nn.Sequential(nn.Linear(8 + DENSE, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.Linear(64, 2)

    def forward(self, item: Tensor, dense: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the sum of the tasks' losses, and their outputs, [B, 2]."""
        outputs = self.heads(self.bottom(torch.cat([self.items(item), dense], dim=1)))
        click = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels[:, 0])
        return {"loss": click + nn.functional.mse_loss(outputs[:, 1], labels[:, 1]), "logits": outputs}


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of an item, dense features and two labels."""

    def __init__(self) -> None:
        self.items, self.dense = torch.randint(ITEMS, (ROWS,)), torch.randn(ROWS, DENSE)
        score = self.dense[:, 0] + 0.5 * torch.cos(self.items.float())
        self.labels = torch.stack([(score > 0).float(), score], dim=1)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"item": self.items[row], "dense": self.dense[row], "labels": self.labels[row]}


# %% [markdown]
# ## Training
#
# The second of `optimizers` is the schedule; with None the Trainer makes the one that its arguments name. It also
# saves and restores the optimizer's state with its checkpoints (`save_strategy`, `resume_from_checkpoint`).

# %%
set_seed(0)
model = Ranker()
optimizer = optim.build_optimizer(
    "clippy",
    model,
    lr=0.1,
    initial_accumulator_value=1e-6,
    embedding={"method": "adagrad", "initial_accumulator_value": 1e-6},
    collect_stats=True,
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        train_sampling_strategy="sequential",  # rows in time order; the default shuffles them
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        max_grad_norm=0,  # the Trainer's own clipping is off
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, None))
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss: {float(losses[0]):.2f} over the first 20 steps, {float(losses[-1]):.2f} over the last 20 steps")
for name, told in optimizer.clip_stats().items():
    print(f"{name:16} clipped in {told['clipped_fraction']:4.0%} of the steps")

# %% [markdown]
# Expect a loss that falls from about 1 to about 0.15. Where the Trainer makes the model itself, give it the class
# instead of the optimizer: `Trainer(optimizer_cls_and_kwargs=(optim.Clippy, {"lr": 0.1}))`. Then the tables are
# clipped too.
