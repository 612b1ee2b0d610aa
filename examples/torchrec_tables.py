"""Clippy beside the embedding tables of torchrec.

The tables of a torchrec model are updated inside the backward pass, by torchrec's own fused Adagrad. That is what the
paper does with embeddings anyway. Clippy takes the dense layers, and both are steps of one optimizer. Needs torchrec
and `fbgemm-gpu` (or `fbgemm-gpu-cpu`). Runs in about ten seconds on one CPU: `python examples/torchrec_tables.py`.
With `torchrun --nproc-per-node 2` the tables are sharded over two processes.
"""

# %% [markdown]
# ## The model
#
# An `EmbeddingBagCollection`, a shared bottom and two tasks: click and watch time. Without a GPU it lives on the CPU,
# with gloo.

# %%
from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

import optim

USERS, ITEMS, DENSE, BATCH, STEPS, LR = 500, 200, 8, 256, 200, 0.1


class Ranker(nn.Module):
    """Two tables and dense features, a shared bottom, one output per task."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        sizes = {"user": USERS, "item": ITEMS}
        tables = [
            EmbeddingBagConfig(name=f"{name}_table", embedding_dim=8, num_embeddings=size, feature_names=[name])
            for name, size in sizes.items()
        ]
        self.tables = EmbeddingBagCollection(tables=tables, device=device)
        self.bottom = nn.Sequential(nn.Linear(16 + DENSE, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.Linear(64, 2)

    def forward(self, ids: KeyedJaggedTensor, dense: Tensor) -> Tensor:
        """Return a logit of the click and the watch time, [B, 2]."""
        return self.heads(self.bottom(torch.cat([self.tables(ids).values(), dense], dim=1)))


def batch(number: int) -> tuple[KeyedJaggedTensor, Tensor, Tensor]:
    """Return the ids of a user and an item per row, dense features [B, F] and labels [B, 2]."""
    seeded = torch.Generator().manual_seed(number)
    users = torch.randint(USERS, (BATCH,), generator=seeded)
    items = torch.randint(ITEMS, (BATCH,), generator=seeded)
    dense = torch.randn(BATCH, DENSE, generator=seeded)
    score = dense[:, 0] + 0.5 * torch.cos(items.float())
    lengths = torch.ones(2 * BATCH, dtype=torch.long)
    ids = KeyedJaggedTensor(keys=["user", "item"], values=torch.cat([users, items]), lengths=lengths)
    return ids, dense, torch.stack([(score > 0).float(), score], dim=1)


# %% [markdown]
# ## Two optimizers, one step
#
# `apply_optimizer_in_backward` marks the tables before the model is wrapped: torchrec then fuses Adagrad into the
# kernel of the backward pass, and the gradient of a table never exists as a tensor. This holds for tables that are
# sharded (`table_wise`, `row_wise`, ...). A small table that the planner would copy to all ranks (`data_parallel`) is
# a dense parameter to torchrec, and would go to Clippy. So the plan says how to shard. The fused Adagrad starts its
# accumulators at 0.

# %%
os.environ.setdefault("MASTER_ADDR", "localhost")
os.environ.setdefault("MASTER_PORT", "0")
rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
dist.init_process_group("gloo", rank=rank, world_size=world_size)
torch.manual_seed(0)
net = Ranker(torch.device("cpu"))
apply_optimizer_in_backward(torch.optim.Adagrad, net.tables.parameters(), {"lr": LR, "eps": 1e-8})
sharded = ParameterConstraints(sharding_types=["table_wise"])
planner = EmbeddingShardingPlanner(
    topology=Topology(world_size=world_size, compute_device="cpu"),
    constraints={"user_table": sharded, "item_table": sharded},
)
plan = planner.collective_plan(net, [EmbeddingBagCollectionSharder()], dist.group.WORLD)
model = DistributedModelParallel(net, device=torch.device("cpu"), plan=plan)

# %% [markdown]
# All other parameters go to Clippy, by name, so that its report has names. `KeyedOptimizerWrapper` and
# `CombinedOptimizer` are torchrec's: a checkpoint has one state for both.

# %%
made: list[optim.SigmaOptimizer] = []


def clippy(params: dict[str, Tensor]) -> optim.SigmaOptimizer:
    """Return Clippy over named tensors."""
    made.append(
        optim.build_optimizer("clippy", params.items(), lr=LR, initial_accumulator_value=1e-6, collect_stats=True)
    )
    return made[-1]


dense = dict(in_backward_optimizer_filter(model.named_parameters()))
wrapped = KeyedOptimizerWrapper(dense, clippy, pass_params_dict=True)
optimizer = CombinedOptimizer([model.fused_optimizer, wrapped])

# %% [markdown]
# ## The loop

# %%
losses = []
for step in range(STEPS):
    ids, features, labels = batch(step * world_size + rank)  # every rank has its own rows
    outputs = model(ids, features)
    click = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels[:, 0])
    loss = click + nn.functional.mse_loss(outputs[:, 1], labels[:, 1])
    optimizer.zero_grad()
    loss.backward()  # the tables have moved
    optimizer.step()  # and now the layers
    losses.append(loss.item())
if rank == 0:
    print(f"loss: {losses[0]:.2f} at the start, {sum(losses[-20:]) / 20:.2f} over the last 20 steps")
    for name, told in made[0].clip_stats().items():
        print(f"{name:16} clipped in {told['clipped_fraction']:4.0%} of the steps")
dist.destroy_process_group()

# %% [markdown]
# Expect a loss that falls from about 1.8 to about 0.1, and a report with the layers only. torchrec and fbgemm print
# some warnings of their own.
