"""torch's own fused Adagrad kernel, for steps in plain torch whose sigma is 1 for sure: faster, and the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from optim.batch import Batch
from optim.updates import ADAGRAD
from optim.updates.adagrad import epsilon_inside, reads_previous
from optim.work import Work


def is_plain(work: Work) -> bool:
    """Whether torch's kernel computes exactly this step when sigma is 1."""
    settings = work.settings
    return (
        work.method.update is ADAGRAD
        and work.weight.device.type == "cpu"
        and work.weight.dtype in (torch.float32, torch.float64)
        and work.grad.dtype == work.state["sum"].dtype == work.weight.dtype
        and not reads_previous(settings)
        and not epsilon_inside(settings)
        and not settings["decoupled_weight_decay"]
        and not isinstance(settings["lr"], Tensor)
    )


def takes_fused(batch: Batch) -> bool:
    """Whether torch's kernel can take the step of a batch."""
    if not batch.idle or torch.compiler.is_compiling() or not all(is_plain(work) for work in batch.works):
        return False
    # The kernel walks memory: rows of a tensor and of its gradient must lie alike.
    return all(work.weight.is_contiguous() and work.grad.is_contiguous() for work in batch.works)


def step_fused(batch: Batch, ok: Tensor | None) -> None:
    """Take the step of a batch by torch's kernel."""
    settings = batch.settings
    torch._fused_adagrad_(
        [work.weight for work in batch.works],
        [work.grad for work in batch.works],
        [work.state["sum"] for work in batch.works],
        [torch.ones(()) for _ in batch.works],  # step counts, of which only a learning rate decay would make use
        lr=settings["lr"],
        lr_decay=0.0,
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        maximize=settings["maximize"],
        found_inf=None if ok is None else ok.logical_not().float(),
    )
    for work in batch.works:
        work.write_back()
