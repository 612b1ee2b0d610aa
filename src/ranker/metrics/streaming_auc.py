"""A running AUC per task, cheap enough for every training step, and what else a detector asks of a batch."""

from __future__ import annotations

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
        self.register_buffer("binary_T", torch.tensor([t.type == "binary" for t in schema.tasks]), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Sets all histograms to 0."""
        tasks, device = len(self.binary_T), self.binary_T.device
        self._histogram_TCK = torch.zeros(tasks, 2, self.bins, device=device)
        # Of the last batch: squared deviations from its mean, numbers of finite logits, other logits, observed labels,
        # sum of the labels and of their squares. With weights, those of labels are weighted, and sum w^2 comes last.
        self._batch_KT = torch.zeros(6, tasks, device=device)
        self._batch_histogram_TCK = torch.zeros_like(self._histogram_TCK)

    @torch.no_grad()
    def update(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor | None = None) -> None:
        """Adds a batch, with weights of its rows or with none."""
        z, tasks = logits_BT.float(), logits_BT.shape[1]
        finite = z.isfinite()
        finite_T = finite.sum(0)
        z = torch.where(finite, z, 0.0)
        # Relative to the first row, constant logits give exactly 0, whatever the rounding of their mean.
        apart = torch.where(finite, z - z[:1], 0.0)
        mean_T = apart.sum(0) / finite_T.clamp(min=1)
        deviation_T = torch.where(finite, apart - mean_T, 0.0).square().sum(0)
        y_BT = torch.where(mask_BT, labels_BT, 0.0)
        if weight_B is None:
            labels = [mask_BT.sum(0), y_BT.sum(0), y_BT.square().sum(0)]
        else:
            w_BT = mask_BT * weight_B[:, None]
            labels = [w_BT.sum(0), (w_BT * y_BT).sum(0), (w_BT * y_BT.square()).sum(0), w_BT.square().sum(0)]
        self._batch_KT = torch.stack([deviation_T, finite_T, (~finite).sum(0), *labels])

        per_unit = self.bins / (2 * self.logit_range)
        bin_BT = ((z + self.logit_range) * per_unit).clamp(0, self.bins - 1).long()
        row_T = 2 * torch.arange(tasks, device=z.device)
        place_BT = (row_T + (labels_BT > 0.5)) * self.bins + bin_BT
        counted_BT = (mask_BT & finite & self.binary_T).float()
        if weight_B is not None:
            counted_BT = counted_BT * weight_B[:, None]
        self._batch_histogram_TCK = torch.zeros(tasks, 2, self.bins, device=z.device)
        self._batch_histogram_TCK.view(-1).index_add_(0, place_BT.view(-1), counted_BT.view(-1))
        self._histogram_TCK = self._histogram_TCK.to(z.device).mul_(self.decay).add_(self._batch_histogram_TCK)

    @torch.no_grad()
    def stats(self, *, all_ranks: bool = True) -> StreamingStats:
        """AUC, spread and counts per task, on the device.

        Args:
            all_ranks: join the ranks if ``torch.distributed`` is initialised (one all-reduce, which every rank must
                call), so that all ranks get the same values and make the same decisions.
        """
        device = self.binary_T.device
        parts = self._batch_KT, self._histogram_TCK, self._batch_histogram_TCK
        flat = torch.cat([part.to(device).view(-1) for part in parts])
        if all_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        batch, histograms = flat.split([self._batch_KT.numel(), 2 * self._histogram_TCK.numel()])
        deviation_T, finite_T, nonfinite_T, labels_T, sum_T, square_T, *squares = batch.view_as(self._batch_KT)
        negative_2TK, positive_2TK = histograms.view(2, *self._histogram_TCK.shape).unbind(2)
        below_2TK = negative_2TK.cumsum(2) - negative_2TK / 2
        positives_2T = positive_2TK.sum(2)
        # 0 / 0 is nan, as intended for the AUC of one class or of a regression.
        auc_T, batch_auc_T = (positive_2TK * below_2TK).sum(2) / (positives_2T * negative_2TK.sum(2))
        positives_T, effective_T = positives_2T[1], labels_T
        if squares:
            effective_T = (labels_T.square() / squares[0]).nan_to_num()
            positives_T = (positives_T / labels_T).nan_to_num() * effective_T
        return StreamingStats(
            auc_T=auc_T,
            batch_auc_T=batch_auc_T,
            positives_T=positives_T,
            labels_T=effective_T,
            variance_T=(square_T / labels_T - (sum_T / labels_T).square()).clamp(min=0),
            spread_T=(deviation_T / finite_T).sqrt(),
            nonfinite_T=nonfinite_T,
        )

    def get_extra_state(self) -> Tensor:
        """The histograms, for the checkpoint. A resumed run measures its first batch again."""
        return self._histogram_TCK

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the histograms of a checkpoint."""
        self._histogram_TCK = state.clone()
