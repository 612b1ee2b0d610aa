"""A running AUC per task, cheap enough for every training step, and what else a detector asks of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranker.data.schema import Schema
from ranker.errors import UserError


class StreamingStats(NamedTuple):
    """The values of ``StreamingAUC``, per task.

    Attributes:
        auc_T: AUC over recent batches. nan for regressions and if one class is missing.
        batch_auc_T: AUC over the last batch alone, likewise. It compares only rows that the same weights have scored.
        positives_T: number of positive labels of the last batch; 0 for regressions.
        labels_T: number of observed labels of the last batch.
        variance_T: their variance; nan without any.
            With row weights w, AUCs and variance are weighted, labels_T is the effective number (sum w)^2 / sum w^2
            (Kish), and positives_T the same share of it as the weighted share of positives.
        spread_T: standard deviation of the last batch's finite logits, over all its rows (root of the mean of the
            ranks' variances, weighted by rows). nan without any.
        nonfinite_T: number of logits of the last batch that are nan or infinite, observed or not.
    """

    auc_T: Tensor
    batch_auc_T: Tensor
    positives_T: Tensor
    labels_T: Tensor
    variance_T: Tensor
    spread_T: Tensor
    nonfinite_T: Tensor


class StreamingAUC(nn.Module):
    """Training AUC over recent batches, cheap enough for every step: histograms of logits with exponential decay.

        h_tcb <- decay * h_tcb + rows of task t, class c, bin b in this batch
        auc_t = sum over b of h_t1b * (sum over b' < b of h_t0b' + h_t0b / 2) / (h_t1 * h_t0)

    Bins have equal width in the logit, from -range to range, and the outermost are open. With equal width in the
    probability, a task with one positive per thousand would use only the first one or two bins.

    If predictions no longer depend on the input, ``spread_T`` is 0: exactly if the shared layers are dead and each
    logit is its head's bias, otherwise up to rounding. Logits that are not finite are counted separately.

    There is no device synchronisation until the caller reads a value. The cost is one pass over the batch and
    O(T * bins). The histograms are part of the module's checkpoint. They are not buffers, because DDP copies rank 0's
    buffers to all ranks, which would overwrite the histograms of the others.

    Args:
        schema: gives the tasks.
        bins: number of bins.
        logit_range: half the width that the bins cover.
        decay: factor on the histograms per batch. 0.99 is a memory of about 100 batches.

    Attributes:
        settle: called before the histograms are read or changed; who keeps batches back adds them now.

    Raises:
        UserError: bins is below 2, the range is not above 0, or the decay is outside of [0, 1].
    """

    binary_T: Tensor

    def __init__(self, schema: Schema, *, bins: int = 512, logit_range: float = 12.0, decay: float = 0.99) -> None:
        super().__init__()
        if bins < 2 or not logit_range > 0 or not 0 <= decay <= 1:
            raise UserError(
                f"streaming AUC: bins >= 2, logit_range > 0 and 0 <= decay <= 1 are needed, got "
                f"{bins}, {logit_range}, {decay}"
            )
        self.bins, self.logit_range, self.decay = bins, logit_range, decay
        self.settle: Callable[[], None] = _nothing
        self.register_buffer("binary_T", torch.tensor([t.type == "binary" for t in schema.tasks]), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Sets all histograms to 0."""
        self.settle()
        tasks, device = len(self.binary_T), self.binary_T.device
        self._histogram_TCK = torch.zeros(tasks, 2, self.bins, device=device)
        # Of the last batches: squared deviations from the mean, numbers of finite logits, of other logits and of
        # observed labels, sums of the labels and of their squares. With weights, those of labels are weighted, and
        # sum w^2 comes last.
        self._batch_SKT = torch.zeros(1, 6, tasks, device=device)
        self._batch_histogram_STCK = torch.zeros_like(self._histogram_TCK)[None]
        self._running_STCK = self._histogram_TCK[None].clone()  # the histograms after each of them

    @torch.no_grad()
    def update(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor | None = None) -> None:
        """Adds a batch, with weights of its rows or with none."""
        self.settle()
        weight_SB = None if weight_B is None else weight_B[None]
        self._add(logits_BT[None], labels_BT[None], mask_BT[None], weight_SB)

    @torch.no_grad()
    def update_all(
        self, logits_SBT: Tensor, labels_SBT: Tensor, mask_SBT: Tensor, weight_SB: Tensor | None = None
    ) -> StreamingStats:
        """Adds S batches of the same size, one after another, and returns the values after each, shape [S, T].

        They are equal to the bit to those of ``update`` and ``stats`` batch by batch on one rank, and cost a fraction:
        most of the time for a small batch is the start of some forty kernels.
        """
        self._add(logits_SBT, labels_SBT, mask_SBT, weight_SB)
        return self._stats(all_ranks=False)

    def _add(self, logits_SBT: Tensor, labels_SBT: Tensor, mask_SBT: Tensor, weight_SB: Tensor | None) -> None:
        z, (steps, _, tasks) = logits_SBT.float(), logits_SBT.shape
        finite = z.isfinite()
        finite_ST = finite.sum(1)
        z = torch.where(finite, z, 0.0)
        # Relative to the first row, constant logits give exactly 0, whatever the rounding of their mean.
        apart = torch.where(finite, z - z[:, :1], 0.0)
        mean_ST = apart.sum(1) / finite_ST.clamp(min=1)
        deviation_ST = torch.where(finite, apart - mean_ST[:, None], 0.0).square().sum(1)
        y_SBT = torch.where(mask_SBT, labels_SBT, 0.0)
        if weight_SB is None:
            labels = [mask_SBT.sum(1), y_SBT.sum(1), y_SBT.square().sum(1)]
        else:
            w_SBT = mask_SBT * weight_SB[:, :, None]
            labels = [w_SBT.sum(1), (w_SBT * y_SBT).sum(1), (w_SBT * y_SBT.square()).sum(1), w_SBT.square().sum(1)]
        self._batch_SKT = torch.stack([deviation_ST, finite_ST, (~finite).sum(1), *labels], 1)

        per_unit = self.bins / (2 * self.logit_range)
        bin_SBT = ((z + self.logit_range) * per_unit).clamp(0, self.bins - 1).long()
        row_ST = 2 * torch.arange(steps * tasks, device=z.device).view(steps, 1, tasks)
        place_SBT = (row_ST + (labels_SBT > 0.5)) * self.bins + bin_SBT
        counted_SBT = (mask_SBT & finite & self.binary_T).float()
        if weight_SB is not None:
            counted_SBT = counted_SBT * weight_SB[:, :, None]
        self._batch_histogram_STCK = torch.zeros(steps, tasks, 2, self.bins, device=z.device)
        self._batch_histogram_STCK.view(-1).index_add_(0, place_SBT.reshape(-1), counted_SBT.reshape(-1))
        self._histogram_TCK = self._histogram_TCK.to(z.device)
        self._running_STCK = torch.empty_like(self._batch_histogram_STCK)
        for running_TCK, batch_TCK in zip(
            self._running_STCK.unbind(), self._batch_histogram_STCK.unbind(), strict=True
        ):
            running_TCK.copy_(self._histogram_TCK.mul_(self.decay).add_(batch_TCK))

    @torch.no_grad()
    def stats(self, *, all_ranks: bool = True) -> StreamingStats:
        """AUC, spread and counts per task, on the device.

        Args:
            all_ranks: join the ranks if ``torch.distributed`` is initialised (one all-reduce, which every rank must
                call), so that all ranks get the same values and make the same decisions.
        """
        return StreamingStats(*(value[-1] for value in self._stats(all_ranks=all_ranks)))

    def _stats(self, *, all_ranks: bool) -> StreamingStats:
        """After each of the last batches, shape [S, T]."""
        device = self.binary_T.device
        parts = self._batch_SKT, self._running_STCK, self._batch_histogram_STCK
        flat = torch.cat([part.to(device).view(-1) for part in parts])
        if all_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        batch, histograms = flat.split([self._batch_SKT.numel(), 2 * self._running_STCK.numel()])
        # A copy: a view would keep all histograms in memory as long as somebody keeps a number of the batch.
        values = batch.clone().view_as(self._batch_SKT).unbind(1)
        deviation_ST, finite_ST, nonfinite_ST, labels_ST, sum_ST, square_ST, *squares = values
        negative_2STK, positive_2STK = histograms.view(2, *self._running_STCK.shape).unbind(3)
        below_2STK = negative_2STK.cumsum(3) - negative_2STK / 2
        positives_2ST = positive_2STK.sum(3)
        # 0 / 0 is nan, as intended for the AUC of one class or of a regression.
        auc_ST, batch_auc_ST = (positive_2STK * below_2STK).sum(3) / (positives_2ST * negative_2STK.sum(3))
        positives_ST, effective_ST = positives_2ST[1], labels_ST
        if squares:
            effective_ST = (labels_ST.square() / squares[0]).nan_to_num()
            positives_ST = (positives_ST / labels_ST).nan_to_num() * effective_ST
        return StreamingStats(
            auc_T=auc_ST,
            batch_auc_T=batch_auc_ST,
            positives_T=positives_ST,
            labels_T=effective_ST,
            variance_T=(square_ST / labels_ST - (sum_ST / labels_ST).square()).clamp(min=0),
            spread_T=(deviation_ST / finite_ST).sqrt(),
            nonfinite_T=nonfinite_ST,
        )

    def get_extra_state(self) -> Tensor:
        """The histograms, for the checkpoint. A resumed run measures its first batch again."""
        self.settle()
        return self._histogram_TCK

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the histograms of a checkpoint."""
        self.settle()
        self._histogram_TCK = state.clone()
        self._running_STCK = self._histogram_TCK[None].clone()


def _nothing() -> None:
    """Nobody keeps batches back."""
