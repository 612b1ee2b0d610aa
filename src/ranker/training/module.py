"""The Lightning module: a ranker, its losses, its metrics and its optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.losses import MultitaskLoss
from ranker.metrics import StreamingAUC, TaskMetrics

log = logging.getLogger(__name__)

OptimizerFactory = Callable[..., Optimizer]


@dataclass(frozen=True)
class StepSignals:
    """What the last training step says about the health of the model; all on the device, none synchronised.

    Attributes:
        losses_T: loss of each task, before weights.
        auc_T: streaming training AUC of each task; NaN for regressions.
        spread_T: standard deviation of each task's logits over the batch; 0 means the input no longer matters.
        nonfinite: bool scalar, whether any logit is nan or infinite.
    """

    losses_T: Tensor
    auc_T: Tensor
    spread_T: Tensor
    nonfinite: Tensor


class RankingModule(pl.LightningModule):
    """Trains a multitask ranker on batches in time order.

    Args:
        net: maps a Batch to logits_BT; its embedding tables stand under ``embeddings``.
        schema: the tasks, in the order of the logits.
        optimizer: called as ``optimizer(model_or_params=net, lr=lr)``.
        lr: learning rate per step, multiplier included.
        warmup_steps: raise the learning rate linearly from lr / warmup_steps to lr over so many steps; 0 for none.
        progressive: score a window before it is trained on, where batches carry ``opening``.
        score_rows: rows a forward pass takes when scoring.
        log_every: write metrics every so many steps.
        compile_net: run the net through torch.compile.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        schema: Schema,
        optimizer: OptimizerFactory,
        lr: float,
        warmup_steps: int = 0,
        progressive: bool = True,
        score_rows: int = 8192,
        log_every: int = 10,
        compile_net: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.schema = schema
        self.lr = lr
        self._optimizer_factory = optimizer
        self._warmup_steps = warmup_steps
        self._progressive = progressive
        self._score_rows = score_rows
        self.log_every = log_every
        if compile_net:
            net.compile(dynamic=True)  # in place: a wrapper would put every weight into the checkpoint twice
        self.loss = MultitaskLoss(schema)
        self.train_auc = StreamingAUC(schema)
        self.holdout_metrics = TaskMetrics(schema)
        self.progressive_metrics = TaskMetrics(schema)
        self.signals: StepSignals | None = None
        self.holdout: dict[str, float] = {}
        self.holdout_notes: dict[str, str] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Logits, shape [B, T]."""
        return self.net(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One forward pass; keeps what the divergence watch and the progress bar read."""
        logits_BT = self(batch)
        loss = self.loss(logits_BT, batch.labels_BT, batch.mask_BT)
        with torch.no_grad():
            self.train_auc.update(logits_BT.detach(), batch.labels_BT, batch.mask_BT)
            stats = self.train_auc.stats()
            self.signals = StepSignals(
                losses_T=self.trainer.strategy.reduce(loss.task_T, reduce_op="mean"),  # each rank has its share
                auc_T=stats.auc_T,
                spread_T=stats.spread_T,
                nonfinite=stats.nonfinite_T.sum() > 0,
            )
        return loss.total

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Scores a window on its first batch: before any of its rows is trained on."""
        if not self._progressive or batch.opening is None:
            return
        self.score(batch.opening, self.progressive_metrics)
        values = self.progressive_metrics.compute()
        self.progressive_metrics.reset()
        self.record(_worth_a_column("progressive", values) | {"window": float(batch.window)})

    def record_step(self) -> None:
        """Writes the numbers of the step just taken, now and then: reading them waits for the device."""
        if self.signals is None or self.global_step % self.log_every:
            return
        losses = self.signals.losses_T.tolist()
        aucs = self.signals.auc_T.tolist()
        values = {"train/loss": sum(w * x for w, x in zip(self._weights(), losses, strict=True))}
        values["lr"] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        for task, loss, auc in zip(self.schema.tasks, losses, aucs, strict=True):
            values[f"train/{task.name}/loss"] = loss
            if task.type == "binary":
                values[f"train/{task.name}/auc"] = auc
        self.record(values)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch of the hold-out."""
        self.holdout_metrics.update(self.net(batch), batch.labels_BT, batch.mask_BT)

    def on_validation_epoch_end(self) -> None:
        """Writes the hold-out's metrics at this step."""
        self._end_holdout("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch of the hold-out."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Writes the hold-out's metrics at the end of training."""
        self._end_holdout("test")
        if self.trainer.is_global_zero:
            for name, why in self.holdout_notes.items():
                log.warning("test/%s is undefined: %s", name, why)

    def configure_optimizers(self) -> Mapping[str, object] | Optimizer:  # type: ignore[override]
        """The optimizer over all parameters, and the warm-up where one was asked for."""
        optimizer = self._optimizer_factory(model_or_params=self.net, lr=self.lr)
        if not self._warmup_steps:
            return optimizer
        steps = self._warmup_steps
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """The global clip; sparse gradients count by their rows, which Lightning's own clipping cannot read."""
        sparse = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None and p.grad.is_sparse]
        if not gradient_clip_val or not sparse:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for param in sparse:
            param.grad = param.grad.coalesce()
        given = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        gradients = [x.values() if x.is_sparse else x for x in given]  # in place
        if gradient_clip_algorithm == "value":
            torch._foreach_clamp_min_(gradients, -gradient_clip_val)
            torch._foreach_clamp_max_(gradients, gradient_clip_val)
            return
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what each rank has seen of its own rows; Lightning keeps the state of rank 0 alone."""
        own = self.train_auc.get_extra_state()
        by_rank = self.all_gather(own) if self.trainer.world_size > 1 else own[None]
        assert isinstance(by_rank, Tensor)
        checkpoint["train_auc_by_rank"] = by_rank.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives this rank its own past back, before the module's state is loaded; of other numbers of ranks the sum."""
        by_rank = checkpoint.get("train_auc_by_rank")
        if by_rank is None:
            return
        rank, same = self.trainer.global_rank, len(by_rank) == self.trainer.world_size
        joined = by_rank.sum(0) if rank == 0 else torch.zeros_like(by_rank[0])
        checkpoint["state_dict"]["train_auc._extra_state"] = by_rank[rank] if same else joined

    @torch.no_grad()
    def score(self, rows: Batch, metrics: TaskMetrics) -> None:
        """Adds the predictions for rows to metrics, without training on them."""
        self.net.eval()
        for part in _pieces(rows, self._score_rows):
            part = part.to(self.device, non_blocking=True)
            metrics.update(self.net(part), part.labels_BT, part.mask_BT)
        self.net.train()

    def record(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        """Sends numbers to every tracker under the step they belong to; None for the step that was taken last."""
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), step=self.global_step if step is None else step)

    def _end_holdout(self, prefix: str) -> None:
        values = self.holdout_metrics.compute()
        self.holdout_notes = self.holdout_metrics.notes
        self.holdout_metrics.reset()
        self.holdout = {f"{prefix}/{name}": value for name, value in values.items()}
        self.record(_worth_a_column(prefix, values))

    def _weights(self) -> list[float]:
        return [task.weight for task in self.schema.tasks]


def _worth_a_column(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Metrics over time, without the counts: those of the last evaluation stand in summary.json."""
    return {f"{prefix}/{name}": v for name, v in values.items() if not name.endswith(("/observed", "/nonfinite"))}


def _pieces(rows: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield rows.slice(start, min(start + size, len(rows)))
