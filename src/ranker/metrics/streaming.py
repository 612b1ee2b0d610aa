"""A running AUC for the training loop, and what else a step's logits say about the health of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranker.data.schema import Schema
from ranker.errors import UserError


class StreamingStats(NamedTuple):
    """What ``StreamingAUC`` knows, by task.

    Attributes:
        auc_T: AUC over the recent past; nan for regressions and where one class is missing.
        spread_T: standard deviation of the last batch's finite logits, over all its rows (root of the mean of the
            ranks' variances, by rows); nan without any.
        nonfinite_T: logits of the last batch that are nan or infinite, observed or not.
    """

    auc_T: Tensor
    spread_T: Tensor
    nonfinite_T: Tensor


class StreamingAUC(nn.Module):
    """Training AUC of the recent past, cheap enough for every step: histograms of logits, old rows fading.

        h_tcb <- decay * h_tcb + rows of task t, class c, bin b in this batch
        auc_t = sum over b of h_t1b * (sum over b' < b of h_t0b' + h_t0b / 2) / (h_t1 * h_t0)

    Bins are of equal width in the logit, from -range to range, the outermost open. Bins of equal width in the
    probability would put a task of one positive in a thousand into its first bin or two.

    Where predictions no longer depend on the input ``spread_T`` is 0: exactly, where the shared layers are dead and
    each logit is its head's bias, and else up to rounding. Logits that are not finite are counted apart.

    Nothing waits for the device until the caller reads a value. The cost is one pass over the batch and O(T * bins).
    The histograms go with the module into a checkpoint. They are no buffers: DDP copies rank 0's buffers to all ranks,
    which would replace what the others have seen.

    Args:
        schema: gives the tasks.
        bins: number of bins.
        logit_range: half the width that the bins cover.
        decay: factor on the past a batch; 0.99 remembers about the last 100 batches.

    Raises:
        UserError: bins below 2, a range not above 0, or a decay outside of [0, 1].
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
        """Forgets the past."""
        tasks, device = len(self.binary_T), self.binary_T.device
        self._histogram_TCK = torch.zeros(tasks, 2, self.bins, device=device)
        # Of the last batch: squared deviations from its mean, finite logits, other logits.
        self._batch_3T = torch.zeros(3, tasks, device=device)

    @torch.no_grad()
    def update(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> None:
        """Adds a batch."""
        z, tasks = logits_BT.float(), logits_BT.shape[1]
        finite = z.isfinite()
        finite_T = finite.sum(0)
        z = torch.where(finite, z, 0.0)
        # Seen from the first row, constant logits leave exactly 0, whatever their mean rounds to.
        apart = torch.where(finite, z - z[:1], 0.0)
        mean_T = apart.sum(0) / finite_T.clamp(min=1)
        deviation_T = torch.where(finite, apart - mean_T, 0.0).square().sum(0)
        self._batch_3T = torch.stack([deviation_T, finite_T.float(), (~finite).sum(0).float()])

        per_unit = self.bins / (2 * self.logit_range)
        bin_BT = ((z + self.logit_range) * per_unit).clamp(0, self.bins - 1).long()
        row_T = 2 * torch.arange(tasks, device=z.device)
        place_BT = (row_T + (labels_BT > 0.5)) * self.bins + bin_BT
        counted_BT = (mask_BT & finite & self.binary_T).float()
        self._histogram_TCK = self._histogram_TCK.to(z.device).mul_(self.decay)
        self._histogram_TCK.view(-1).index_add_(0, place_BT.view(-1), counted_BT.view(-1))

    def compute(self, *, all_ranks: bool = True) -> Tensor:
        """The running auc_T alone; see ``stats``."""
        return self.stats(all_ranks=all_ranks).auc_T

    @torch.no_grad()
    def stats(self, *, all_ranks: bool = True) -> StreamingStats:
        """AUC, spread and counts by task, on the device.

        Args:
            all_ranks: join the ranks where ``torch.distributed`` is initialised (one all-reduce, every rank must
                call), so that all of them see, and decide, the same.
        """
        device = self.binary_T.device
        flat = torch.cat([self._batch_3T.to(device).view(-1), self._histogram_TCK.to(device).view(-1)])
        if all_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        batch, histogram = flat.split([self._batch_3T.numel(), self._histogram_TCK.numel()])
        deviation_T, finite_T, nonfinite_T = batch.view_as(self._batch_3T)
        negative_TK, positive_TK = histogram.view_as(self._histogram_TCK).unbind(1)
        below_TK = negative_TK.cumsum(1) - negative_TK / 2
        pairs_T = positive_TK.sum(1) * negative_TK.sum(1)
        # 0 / 0 is nan, which is what an AUC of one class or of a regression should be.
        return StreamingStats(
            auc_T=(positive_TK * below_TK).sum(1) / pairs_T,
            spread_T=(deviation_T / finite_T).sqrt(),
            nonfinite_T=nonfinite_T,
        )

    def get_extra_state(self) -> Tensor:
        """The histograms, for the checkpoint. A run that goes on from it measures its first batch anew."""
        return self._histogram_TCK

    def set_extra_state(self, state: Tensor) -> None:
        """Goes on from a checkpoint's histograms."""
        self._histogram_TCK = state.clone()
