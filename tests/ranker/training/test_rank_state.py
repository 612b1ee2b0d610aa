"""What each rank has seen of its own rows, through a checkpoint that rank 0 writes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ranker.data.schema import DenseFeature, Schema, Task
from ranker.training.module import RankingModule

SCHEMA = Schema(name="s", time_column="t", dense=(DenseFeature(name="x"),), tasks=(Task(name="click"),))


def module(rank, world_size):
    built = RankingModule(nn.Linear(1, 1), schema=SCHEMA, optimizer=torch.optim.SGD, lr=0.1)
    data = SimpleNamespace(trained=lambda: (0, 0, None))
    built._trainer = SimpleNamespace(global_rank=rank, world_size=world_size, datamodule=data, global_step=0)
    return built


def histogram(built):
    return built.train_auc.get_extra_state()


def restored(checkpoint, rank, world_size):
    built = module(rank, world_size)
    own = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}  # each process reads the file itself
    built.on_load_checkpoint(own)
    built.load_state_dict(own["state_dict"])
    return histogram(built)


@pytest.fixture
def two_ranks(monkeypatch):
    """The checkpoint of rank 0 of two that saw different rows, and what each of them saw."""
    built = module(0, 2)
    seen = torch.stack([torch.full_like(histogram(built), 1.0), torch.full_like(histogram(built), 2.0)])
    built.train_auc.set_extra_state(seen[0])
    monkeypatch.setattr(built, "all_gather", lambda own: seen)
    checkpoint = {"state_dict": built.state_dict()}
    built.on_save_checkpoint(checkpoint)
    return checkpoint, seen


def test_each_rank_gets_its_own_past_back(two_ranks):
    checkpoint, seen = two_ranks
    for rank in range(2):
        assert torch.equal(restored(checkpoint, rank, 2), seen[rank])


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_goes_on_with_the_sum(two_ranks, world_size):
    checkpoint, seen = two_ranks
    got = torch.stack([restored(checkpoint, rank, world_size) for rank in range(world_size)])
    assert torch.equal(got.sum(0), seen.sum(0))


def test_one_rank_alone_keeps_what_it_saw():
    built = module(0, 1)
    built.train_auc.set_extra_state(torch.full_like(histogram(built), 3.0))
    checkpoint = {"state_dict": built.state_dict()}
    built.on_save_checkpoint(checkpoint)
    assert torch.equal(restored(checkpoint, 0, 1), histogram(built))
