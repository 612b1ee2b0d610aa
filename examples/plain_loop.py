"""Clippy in a plain PyTorch loop.

A ranker with two embedding tables, a shared bottom and two tasks (click, watch time), trained by hand. What changes
in a loop of your own is one line, the optimizer. The rest shows what else it offers: schedules, checkpoints, and a
report of what was clipped. Runs in about two seconds: `python examples/plain_loop.py`.
"""

# %% [markdown]
# ## The model and the data
#
# Nothing here knows the optimizer. The tables are `nn.EmbeddingBag` or `nn.Embedding`: that is how they are
# recognised.

# %%
from __future__ import annotations

import io

import torch
from torch import Tensor, nn

import optim

USERS, ITEMS, DENSE, BATCH, STEPS = 500, 200, 8, 256, 300


class Ranker(nn.Module):
    """Two tables and dense features, a shared bottom, one output per task."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(USERS, 8)
        self.items = nn.Embedding(ITEMS, 8)
        self.bottom = nn.Sequential(nn.Linear(16 + DENSE, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.Linear(64, 2)

    def forward(self, users: Tensor, items: Tensor, dense: Tensor) -> Tensor:
        """Return a logit of the click and the watch time, [B, 2]."""
        return self.heads(self.bottom(torch.cat([self.users(users), self.items(items), dense], dim=1)))


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return users [B], items [B], dense features [B, F] and labels [B, 2]; a step always has the same rows."""
    seeded = torch.Generator().manual_seed(step)
    users = torch.randint(USERS, (BATCH,), generator=seeded)
    items = torch.randint(ITEMS, (BATCH,), generator=seeded)
    dense = torch.randn(BATCH, DENSE, generator=seeded)
    score = dense[:, 0] + 0.5 * torch.sin(users.float()) * torch.cos(items.float())
    return users, items, dense, torch.stack([(score > 0).float(), score], dim=1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Return the sum of the tasks' losses on one batch."""
    *inputs, labels = batch(step)
    outputs = model(*inputs)
    click = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels[:, 0])
    return click + nn.functional.mse_loss(outputs[:, 1], labels[:, 1])


# %% [markdown]
# ## The optimizer
#
# `build_optimizer` takes the model, not its parameters. So it knows which parameters are embeddings, and the report
# has names. Clippy bounds the dense layers. The tables keep plain Adagrad, as in the paper. G_0, the start of the
# accumulators, is small, because the loss is a mean over the batch: with the customary 0.1 nothing would adapt.

# %%
torch.manual_seed(0)
model = Ranker()
optimizer = optim.build_optimizer(
    "clippy",
    model,
    lr=0.1,
    initial_accumulator_value=1e-6,
    embedding={"method": "adagrad", "initial_accumulator_value": 1e-6},
    collect_stats=True,
)
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=50)

# %% [markdown]
# ## The loop
#
# As for every `torch.optim.Optimizer`.

# %%
losses = []
for step in range(STEPS):
    loss = loss_of(model, step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    warmup.step()
    losses.append(loss.item())
print(f"loss: {losses[0]:.2f} at the start, {sum(losses[-20:]) / 20:.2f} over the last 20 steps")

# %% [markdown]
# Expect a loss that falls from about 1.7 to about 0.25.
#
# ## What was clipped
#
# Sigma is the factor on the step of a tensor. 1 throughout: clipping is not needed at this rate. Below 0.01
# throughout: the rate is far too large. Statistics stay on the device until they are read.

# %%
for name, told in optimizer.clip_stats().items():
    print(
        f"{name:16} clipped in {told['clipped_fraction']:4.0%} of the steps, sigma {told['sigma_mean']:.2f} on average"
    )

# %% [markdown]
# ## Checkpoints
#
# The state is made of tensors, numbers and strings, so it loads with `weights_only=True`. A restored run goes on with
# the same bits.

# %%
file = io.BytesIO()  # a path in real life
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
file.seek(0)
saved = torch.load(file, weights_only=True)
restored = Ranker()
restored.load_state_dict(saved["model"])
again = optim.build_optimizer("clippy", restored, lr=0.1, embedding={"method": "adagrad"})
again.load_state_dict(saved["optimizer"])
for net, stepper in ((model, optimizer), (restored, again)):
    stepper.zero_grad()
    loss_of(net, STEPS).backward()
    stepper.step()
same = all(torch.equal(one, other) for one, other in zip(model.parameters(), restored.parameters(), strict=True))
print(f"the restored run makes the same step: {same}")
