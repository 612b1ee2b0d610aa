"""The callback that gives trackers histograms of weights, gradients and accumulators, on demand."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ranker.errors import UserError
from ranker.training import trackers
from ranker.training.fit import Fit
from ranker.training.tracker import Histogram

WEIGHTS, GRADIENTS, ACCUMULATORS = "weights", "gradients", "log10_G"


class Histograms(Callback):
    """Measures histograms before an optimizer step, in the first process, and gives them to the trackers.

    Names are ``histograms/weights/<parameter>``, ``histograms/gradients/<parameter>`` and
    ``histograms/log10_G/<parameter>``, of the accumulator G of Adagrad (``state["sum"]``) after the step before. It
    spans many powers of ten, so its logarithm is shown; coordinates where it is 0 are left out. The gradient is that of
    all ranks, before any clipping. Of sharded parameters the first rank's part is measured.

    Args:
        every: steps between two measurements; 0 measures nothing.
        bins: number of bins, between the smallest and the largest finite value.
        parameters: beginnings of the parameters' names; None for all except the embedding tables, whose many rows say
            little in one histogram.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(self, *, every: int = 0, bins: int = 64, parameters: Sequence[str] | None = None) -> None:
        if every < 0 or not 1 <= bins <= 512:  # 512: what W&B takes
            raise UserError(f"callbacks.histograms: every must be 0 or more, bins 1 to 512; got {every} and {bins}")
        self._every, self._bins, self._parameters = every, bins, parameters

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses names that no parameter has."""
        names = [name for name, _ in Fit(trainer).module.net.named_parameters()]
        for start in self._parameters or () if self._every else ():
            if not any(name.startswith(start) for name in names):
                raise UserError(f"callbacks.histograms.parameters: no parameter begins with '{start}'")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measures, if it is due."""
        step = trainer.global_step + 1
        if not self._every or step % self._every or not trainer.is_global_zero or not trainer.loggers:
            return
        found: dict[str, Histogram] = {}
        for name, p in Fit(trainer).module.net.named_parameters():
            if not self._is_wanted(name):
                continue
            total = optimizer.state.get(p, {}).get("sum")
            parts = {WEIGHTS: p, GRADIENTS: p.grad, ACCUMULATORS: None if total is None else _log10(total)}
            for kind, values in parts.items():
                histogram = None if values is None else histogram_of(values, bins=self._bins)
                if histogram is not None:
                    found[f"histograms/{kind}/{name}"] = histogram
        trackers.histograms(trainer.loggers, found, step)

    def _is_wanted(self, name: str) -> bool:
        if self._parameters is None:
            return not name.startswith("embeddings.")
        return name.startswith(tuple(self._parameters))


@torch.no_grad()
def histogram_of(values: Tensor, *, bins: int) -> Histogram | None:
    """Counts the finite values of a tensor; of a sparse one those that it stores. None where there is none.

    Args:
        values: of any shape.
        bins: number of bins.
    """
    flat = _local(values).reshape(-1).float()
    flat = flat[flat.isfinite()]
    if not flat.numel():
        return None
    low, high = (float(x) for x in torch.aminmax(flat))
    if low == high:  # all values are equal
        low, high = low - max(abs(low), 1.0) * 1e-6, high + max(abs(high), 1.0) * 1e-6
    counts = torch.histc(flat, bins=bins, min=low, max=high)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return Histogram(counts.tolist(), edges.tolist())


def _log10(total: Tensor) -> Tensor:
    own = _local(total)
    return own[own > 0].float().log10()


def _local(values: Tensor) -> Tensor:
    own = values.detach()
    own = own.to_local() if isinstance(own, DTensor) else own
    return own.coalesce().values() if own.is_sparse else own
