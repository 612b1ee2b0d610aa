"""The parts of a training step that the Lightning module and replay share: loss, signals and gradient clipping.

Lightning runs the rest of the step (backward, accumulation, optimizer, learning rate) in a training run;
``ranker.replay.engine`` runs it by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.losses import Loss, MultitaskLoss
from ranker.metrics import StreamingAUC, StreamingStats
from ranker.stability import pack
from ranker.stability.detector_interface import Signals
from ranker.stability.step_cut import StepCut, shared_weights


class Trainable(Protocol):
    """The parts of ``ranker.training.module.RankingModule`` that a step needs."""

    net: nn.Module
    schema: Schema
    loss: MultitaskLoss
    train_auc: StreamingAUC

    def configure_optimizers(self) -> Any:
        """An optimizer, or Lightning's dict with the optimizer and its schedule."""
        ...


@dataclass(frozen=True)
class StepSignals:
    """Signals of a training step for the divergence detector, on the device; reading them waits for the device.

    Attributes:
        losses_T: loss of each task, before task weights.
        auc_T: streaming training AUC of each task; NaN for regressions.
        spread_T: standard deviation of each task's logits over the batch; 0 if they do not depend on the input.
        nonfinite: bool scalar, whether any logit is NaN or infinite.
        batch_auc_T: AUC of the batch of each task.
        positives_T: number of positive labels of the batch.
        labels_T: number of observed labels of the batch.
        variance_T: variance of these labels.
        step_cut_3: by how much the last steps cut the step size; None before the optimizer's step.
        ranking_T: ranking loss of each task, which the detector does not read; None without one.
    """

    losses_T: Tensor
    auc_T: Tensor
    spread_T: Tensor
    nonfinite: Tensor
    batch_auc_T: Tensor
    positives_T: Tensor
    labels_T: Tensor
    variance_T: Tensor
    step_cut_3: Tensor | None = None
    ranking_T: Tensor | None = None

    def after_step(self, step_cut: StepCut | None) -> StepSignals:
        """These signals with that of the accumulators, which the optimizer's step has changed by now."""
        return self if step_cut is None else replace(self, step_cut_3=step_cut.update())

    def as_dict(self) -> Signals:
        """The signals by name, as keyword arguments of ``reduce_signals`` and ``pack``."""
        return cast(Signals, {name: value for name, value in vars(self).items() if name != "ranking_T"})

    def packed(self) -> Tensor:
        """One row, in the order of ``pack``."""
        return pack(**self.as_dict())


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a batch leaves for its signals, without a graph. Arguments of ``step_signals``."""

    logits_BT: Tensor
    labels_BT: Tensor
    mask_BT: Tensor
    losses_T: Tensor
    weight_B: Tensor | None = None
    ranking_T: Tensor | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for batches that can be stacked."""
        return self.logits_BT.shape, self.logits_BT.dtype, self.weight_B is None, self.ranking_T is None


def forward_loss(
    trained: Trainable, batch: Batch, *, counts_T: Tensor | None = None, ranks: int = 1
) -> tuple[Tensor, Loss]:
    """Forward pass and loss of one rank's rows.

    Args:
        trained: the model and its loss.
        batch: the rows, on the model's device.
        counts_T: ``MultitaskLoss.counts`` of all ranks' rows. None: the ranks of ``torch.distributed`` sum them, and
            all must call.
        ranks: number of ranks, where ``counts_T`` is given.

    Returns:
        Logits [B, T] and the loss.
    """
    logits_BT = trained.net(batch)
    return logits_BT, batch_loss(trained.loss, logits_BT, batch, counts_T=counts_T, ranks=ranks)


def batch_loss(
    loss: MultitaskLoss, logits_BT: Tensor, batch: Batch, *, counts_T: Tensor | None = None, ranks: int = 1
) -> Loss:
    """Loss of one rank's rows, with their weights and groups. Arguments as of ``forward_loss``."""
    rows = batch.labels_BT, batch.mask_BT
    if counts_T is None:
        return loss(logits_BT, *rows, weight_B=batch.weight_B, groups_BG=batch.groups_BG)
    return loss.local(
        logits_BT, *rows, counts_T=counts_T, ranks=ranks, weight_B=batch.weight_B, groups_BG=batch.groups_BG
    )


def batch_counts(loss: MultitaskLoss, batch: Batch) -> Tensor:
    """What one rank's rows add to the denominators of the loss."""
    return loss.counts(batch.labels_BT, batch.mask_BT, weight_B=batch.weight_B, groups_BG=batch.groups_BG)


@torch.no_grad()
def step_signals(
    trained: Trainable,
    logits_BT: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor,
    *,
    losses_T: Tensor,
    weight_B: Tensor | None = None,
    ranking_T: Tensor | None = None,
) -> StepSignals:
    """Adds the rows to the training AUC and returns the signals.

    Args:
        trained: has the training AUC.
        logits_BT: the model's output.
        labels_BT: labels.
        mask_BT: bool, true where a label is observed.
        losses_T: log loss or squared error of each task over all ranks, without any factor.
        weight_B: weights of the rows; None: 1.
        ranking_T: ranking loss of each task over all ranks. The detector reads the pointwise losses, whose size is that
            of a known baseline, and of this one only whether it is finite.
    """
    trained.train_auc.update(logits_BT.detach(), labels_BT, mask_BT, weight_B)
    return _signals(trained.train_auc.stats(), losses_T, ranking_T)


@torch.no_grad()
def several_signals(trained: Trainable, seen: Sequence[Seen]) -> tuple[StepSignals, Tensor]:
    """The signals of S batches of the same size, as ``step_signals`` would give them one after another on one rank.

    Returns:
        The signals with a leading dimension of S, and their rows [S, N], in the order of ``pack``.
    """
    weight_SB = [x.weight_B for x in seen if x.weight_B is not None]
    ranking_ST = [x.ranking_T for x in seen if x.ranking_T is not None]
    stats = trained.train_auc.update_all(
        torch.stack([x.logits_BT for x in seen]),
        torch.stack([x.labels_BT for x in seen]),
        torch.stack([x.mask_BT for x in seen]),
        torch.stack(weight_SB) if weight_SB else None,
    )
    losses_ST = torch.stack([x.losses_T for x in seen])
    together = _signals(stats, losses_ST, torch.stack(ranking_ST) if ranking_ST else None)
    return together, together.packed()


def _signals(stats: StreamingStats, losses_T: Tensor, ranking_T: Tensor | None) -> StepSignals:
    """From what was measured; of one step, or of several with a leading dimension."""
    nonfinite = stats.nonfinite_T.sum(-1) > 0
    return StepSignals(
        losses_T=losses_T,
        auc_T=stats.auc_T,
        spread_T=stats.spread_T,
        nonfinite=nonfinite if ranking_T is None else nonfinite | ~ranking_T.isfinite().all(-1),
        batch_auc_T=stats.batch_auc_T,
        positives_T=stats.positives_T,
        labels_T=stats.labels_T,
        variance_T=stats.variance_T,
        ranking_T=ranking_T,
    )


def make_step_cut(net: nn.Module, optimizer: torch.optim.Optimizer) -> StepCut:
    """Watches the step size of the layers that the tasks share, named by role where ``layer_names`` has one."""
    roles: dict[str, str] = net.layer_names()  # type: ignore[operator]
    heads = {name for role, name in roles.items() if role.startswith("head/")}
    shared = shared_weights(net.named_parameters(), heads=heads)
    named: dict[str, Tensor] = {}
    for layer, weight in shared.items():
        role = next((role for role, name in roles.items() if f"{layer}.".startswith(f"{name}.")), layer)
        named[layer if role in named else role] = weight  # a cross layer of low rank has two matrices
    return StepCut(named, optimizer)


def clip_gradients(parameters: Iterable[Tensor], bound: float, *, by_value: bool) -> None:
    """Clips dense and sparse gradients in place. A sparse gradient counts by its rows.

        by norm    g <- g min(1, bound / (norm + 1e-6)), norm the 2-norm of all gradients together
        by value   g <- min(max(g, -bound), bound)

    Without sparse gradients this is torch's own function, also for sharded parameters.

    Args:
        parameters: parameters, in the order of the optimizer's groups.
        bound: the bound, above 0.
        by_value: clip each coordinate instead of the norm.
    """
    parameters = [p for p in parameters if p.grad is not None]
    sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
    if not sparse:
        if by_value:
            nn.utils.clip_grad_value_(parameters, bound)
        else:
            nn.utils.clip_grad_norm_(parameters, bound)
        return
    for param in sparse:  # rows that occur twice in a batch are added up before they are measured
        assert param.grad is not None
        param.grad = param.grad.coalesce()
    gradients = [p.grad.values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    if by_value:
        torch._foreach_clamp_min_(gradients, -bound)
        torch._foreach_clamp_max_(gradients, bound)
    else:
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (bound / (norm + 1e-6)).clamp(max=1.0))
