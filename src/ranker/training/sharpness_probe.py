"""The callback that measures sharpness: how near the step is to the edge of stability."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from ranker.data.batch import Batch
from ranker.errors import UserError
from ranker.runs import metric_names as names
from ranker.stability import Preconditioner, ReportsSteps, measure_sharpness, step_preconditioner
from ranker.training.fit import Fit
from ranker.training.module import RankingModule
from ranker.training.training_step import batch_counts, batch_loss

HESSIAN, PRECONDITIONED, RATIO, ERROR, SECONDS = map(
    names.sharpness, ("hessian", "preconditioned", "ratio", "error", "seconds")
)

log = logging.getLogger(__name__)


class SharpnessProbe(Callback):
    """Measures the largest eigenvalue of the Hessian, plain and preconditioned, at an interval.

        sharpness/hessian          largest eigenvalue of H
        sharpness/preconditioned   largest eigenvalue of P^(1/2) H P^(1/2), where the optimizer multiplies a gradient by
                                   P: sigma G^(-1/2) for the Adagrad family; without clipping G^(-1/4) H G^(-1/4)
        sharpness/ratio            sharpness/preconditioned divided by 2 / lr; above 1 the next step is too large
        sharpness/error            bound on the relative error of sharpness/preconditioned
        sharpness/seconds          duration of the measurement

    H is the Hessian of the training loss on the first rows of the batch just trained on, in evaluation mode, over all
    parameters but the embedding tables. Weights, gradients, buffers and random numbers do not change by a bit. With
    several ranks the first one measures, on its own rows, and the others wait. Values are NaN where the model is lost.

    A measurement costs up to ``2 * max_products`` Hessian-vector products, each about two gradients of ``rows`` rows,
    and memory for ``max_products`` vectors as long as all dense weights. The first one logs its duration.

    Args:
        every: steps between two measurements; 0 to switch off.
        rows: number of rows of the batch; H itself needs more rows than its sharpest direction does.
        hessian: also measure H without preconditioner, which doubles the cost.
        max_products: largest number of Hessian-vector products per eigenvalue.
        tolerance: relative error at which an eigenvalue counts as converged.

    Raises:
        UserError: a number is out of range.

    Source: Tang et al. (2023), Figure 3; Cohen et al. (2022), Adaptive Gradient Methods at the Edge of Stability.
    """

    def __init__(
        self, *, every: int = 0, rows: int = 512, hessian: bool = True, max_products: int = 32, tolerance: float = 0.01
    ) -> None:
        for name, value, least in (("every", every, 0), ("rows", rows, 1), ("max_products", max_products, 2)):
            if value < least:
                raise UserError(f"callbacks.sharpness.{name} must be {least} or more, got {value}")
        if not 0 < tolerance < 1:
            raise UserError(f"callbacks.sharpness.tolerance must be between 0 and 1, got {tolerance}")
        self._every = every
        self._rows = rows
        self._hessian = hessian
        self._lanczos = {"max_products": max_products, "tolerance": tolerance}
        self._looks = 0
        self._look_seconds = 0.0
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last: dict[str, float] = {}
        self._kind = ""
        self._started = 0.0
        self._stepped = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses parameters that cannot be measured."""
        if self._every and any(isinstance(p, DTensor) for p in pl_module.parameters()):
            raise UserError("callbacks.sharpness cannot look at sharded parameters; use trainer=ddp, or every=0")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock of the step."""
        self._started = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes that this batch ends with a step; with accumulated gradients not every batch does."""
        self._stepped = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures, if a measurement is due."""
        stepped, self._stepped = self._stepped, False
        if not self._every or not trainer.is_global_zero or not stepped:
            return
        start = time.perf_counter()
        self._step_seconds.append(start - self._started)
        if trainer.global_step % self._every:
            return
        self._last = self.measure(Fit(trainer).module, trainer.optimizers[0], batch)
        seconds = self._last[SECONDS] = time.perf_counter() - start
        self._looks += 1
        self._look_seconds += seconds
        if self._looks == 1:
            step = statistics.median(self._step_seconds)
            log.info(
                "sharpness: a look takes %.2g s, as long as %.0f training steps; every %d steps that is %.0f %% more "
                "time. The step is taken as %s",
                *(seconds, seconds / step, self._every, 100 * seconds / step / self._every, self._kind),
            )
        Fit(trainer).module.record(self._last)

    def measure(self, module: RankingModule, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
        """The values of one measurement, by name; NaN where loss, weights or steps are not finite."""
        net = module.net
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad and not n.startswith("embeddings.")]
        step = step_preconditioner(optimizer, [p for _, p in named], sigma=_sigma(optimizer, named))
        self._kind = step.kind
        rows = batch.slice(0, min(self._rows, len(batch)))
        training = net.training
        net.eval()
        try:
            with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
                # forward, because compiled programs cannot be differentiated twice
                logits_BT = net.forward(rows)
                counts_T = batch_counts(module.loss, rows)
                loss = batch_loss(module.loss, logits_BT, rows, counts_T=counts_T).total
                return self._eigenvalues(loss, step)
        finally:
            net.train(training)

    def _eigenvalues(self, loss: Tensor, step: Preconditioner) -> dict[str, float]:
        found = dict.fromkeys((HESSIAN, PRECONDITIONED, RATIO), math.nan)
        if not self._hessian:
            del found[HESSIAN]
        found[ERROR] = math.nan
        if not step.parameters:
            return found
        try:
            if self._hessian or step.is_identity:
                plain = measure_sharpness(loss, step.parameters, lr=step.lr, **self._lanczos)  # type: ignore[arg-type]
                if self._hessian:
                    found[HESSIAN] = plain.value
            if not step.is_identity:
                plain = measure_sharpness(
                    loss,
                    step.parameters,
                    lr=step.lr,
                    preconditioner=step.diagonals,
                    **self._lanczos,  # type: ignore[arg-type]
                )
        except UserError as error:  # a lost model: its Hessian is not finite
            log.debug("%s", error)
            return found
        found[PRECONDITIONED], found[RATIO] = plain.value, plain.ratio
        found[ERROR] = plain.error / abs(plain.value) if plain.value else 0.0
        return found

    def summary(self) -> dict[str, Any] | None:
        """The entry of summary.json; None if nothing was measured."""
        if not self._looks:
            return None
        last = {name.removeprefix(names.SHARPNESS): value for name, value in self._last.items()}
        cost = {"looks": self._looks, "seconds": round(self._look_seconds, 1), "step_taken_as": self._kind}
        return cost | {f"last_{name}": last[name] for name in ("hessian", "preconditioned", "ratio") if name in last}


def _sigma(optimizer: torch.optim.Optimizer, named: list[tuple[str, torch.nn.Parameter]]) -> dict[Tensor, float]:
    """Sigma of the last step, if the optimizer reports it; the smallest one where there is one per unit or row."""
    if not isinstance(optimizer, ReportsSteps):
        return {}
    steps = optimizer.last_step()
    known = [(p, steps[name].sigma) for name, p in named if name in steps and steps[name].clipped]
    if not known:
        return {}
    numbers = torch.stack([sigma for _, sigma in known]).tolist()
    return {p: number for (p, _), number in zip(known, numbers, strict=True)}
