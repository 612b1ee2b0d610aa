"""The Lightning module: a ranker with its losses, metrics and optimizer; and typed access to it for callbacks."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ranker.data.batch import Batch
from ranker.data.datamodule import RankingDataModule
from ranker.data.schema import Schema
from ranker.errors import one_of
from ranker.losses import MultitaskLoss, best_constants
from ranker.metrics import StreamingAUC, Table, TaskMetrics
from ranker.models import Ranker
from ranker.models.admission import admission_of, observe
from ranker.runs import metric_names as names
from ranker.runs.lineage import LINEAGE, totals
from ranker.runs.run_folder import (
    AVERAGE,
    NET_PREFIX,
    OPTIMIZER_SETTINGS,
    RECENT,
    SHARDED,
    STATE_DICT,
    TRAIN_AUC,
    TRAIN_AUC_BY_RANK,
)
from ranker.training.deferred_signals import DeferredSignals, LateSignals
from ranker.training.fit import Fit
from ranker.training.hyperparameters import scale_lr, settings_of
from ranker.training.metric_rows import over_time, step_values
from ranker.training.training_step import Seen, clip_gradients, forward_loss
from ranker.training.weight_average import WeightAverage

if TYPE_CHECKING:
    from ranker.training.large_tables import LargeTables
    from ranker.training.sharded_tables import TablesOfRun

log = logging.getLogger(__name__)
KEPT_SIGNALS = 1000  # steps

OptimizerFactory = Callable[..., Optimizer]

HEAD_BIASES = ("labels", "zero")
_ROWS_FOR_HEAD_BIASES = 65_536


class RankingModule(pl.LightningModule):
    """Trains a multitask ranker on batches in time order.

    Args:
        net: maps a Batch to logits_BT; its embedding tables are below ``embeddings``.
        schema: the tasks, in the order of the logits.
        optimizer: called as ``optimizer(model_or_params=net, lr=lr)``.
        lr: learning rate per step, multiplier included.
        warmup_steps: raise the learning rate linearly from lr / warmup_steps to lr over this many steps; 0 for none.
        rewarm_steps: the same for a run that continues another one, counted from its own first step.
        average_decay: of the moving average of the dense weights that is evaluated and exported; 0 for none.
        before: what the run continues, as in ``ranker.runs.lineage``; the warm-up goes on where it was. None: nothing.
        head_bias: ``labels`` starts each head's bias at the constant that fits the labels of the first window best (log
            odds or mean). Without it, the first steps pay for the distance, with the largest gradients of the run.
            ``zero`` keeps the model's own initial values.
        progressive: score a window before it is trained on, where batches carry ``opening``.
        score_rows: rows per forward pass when scoring.
        log_every: steps between two writes of the metrics.
        compile_net: run the net through torch.compile.
        loss: the training loss. None: log losses and squared errors.
        metrics: makes the metrics of the hold-out and of progressive validation. None: those that every run has.
        tables: the net's tables, if they are sharded.

    Attributes:
        large: local tables of which snapshots keep touched rows alone; None where there are none.
        optimizer_factory: as ``optimizer``. A rollback may set another one, see ``ranker.training.rollback``.
        average_decay: as given.
        average: the moving average of the dense weights; None before training starts, and without one.
        warm_start: puts the state of an earlier run into the fit when it starts; None for random weights.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        schema: Schema,
        optimizer: OptimizerFactory,
        lr: float,
        warmup_steps: int = 0,
        rewarm_steps: int = 0,
        average_decay: float = 0.0,
        before: Mapping[str, Any] | None = None,
        head_bias: str = "zero",
        progressive: bool = True,
        score_rows: int = 8192,
        log_every: int = 10,
        compile_net: bool = False,
        loss: MultitaskLoss | None = None,
        metrics: Callable[[], TaskMetrics] | None = None,
        tables: TablesOfRun | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.tables = tables
        self.large: LargeTables | None = None
        self.schema = schema
        self.lr = lr
        self.optimizer_factory = optimizer
        self._warmup_steps, self._rewarm_steps = warmup_steps, rewarm_steps
        self.rewarm_from = 0  # the step of the schedule whose rate is the lowest of the newest warm-up
        self._before = before
        self.warm_start: Callable[[Fit], None] | None = None
        self.average_decay = average_decay
        self.average: WeightAverage | None = None
        self._averaged_step = 0  # of the last update
        self._saved_average: Mapping[str, Any] | None = None  # in the checkpoint
        one_of(head_bias, HEAD_BIASES, "train.head_bias")
        self._head_bias = head_bias
        self._progressive = progressive
        self._score_rows = score_rows
        self.log_every = log_every
        if compile_net:
            net.compile(dynamic=True)  # in place: a wrapper would put every weight into the checkpoint twice
        self.loss = loss or MultitaskLoss(schema)
        self.train_auc = StreamingAUC(schema)
        make_metrics = metrics or (lambda: TaskMetrics(schema))
        self.holdout_metrics, self.progressive_metrics = make_metrics(), make_metrics()
        self.last_progressive: tuple[int, Mapping[str, float]] | None = None  # window that was scored last, metrics
        self._late = DeferredSignals(self)
        self.signals: LateSignals | None = None  # of the last batch
        # Steps, their signals and learning rates. A verdict comes some hundred steps after the first step of its event.
        self._unrecorded: deque[tuple[int, LateSignals | Recent, float]] = deque(maxlen=KEPT_SIGNALS)
        self._rows: dict[int, dict[str, float]] | None = None  # to be sent, by step
        self.holdout: dict[str, float] = {}
        self.holdout_notes: dict[str, str] = {}
        self.holdout_intervals: dict[str, tuple[float, float]] = {}
        self.holdout_tables: list[Table] = []
        self._settings: list[dict[str, Any]] = []  # of the optimizer, as configured
        self._saved_settings: list[dict[str, Any]] | None = None  # those of the checkpoint
        self.holdout_step: int | None = None  # of an evaluation outside training; None: the last step

    def forward(self, batch: Batch) -> Tensor:
        """Logits, shape [B, T]."""
        return self.net(batch)

    @property
    def rows(self) -> TablesOfRun | LargeTables | None:
        """The tables that snapshots do not copy; None where they copy all."""
        return self.tables or self.large

    def configure_model(self) -> None:
        """Shards the net over the ranks, where the strategy has made a mesh for it."""
        if self.device_mesh is not None:
            from ranker.training.fsdp import shard  # imported late: it takes a second

            shard(self.net, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Shards the tables, where they are to be sharded: the processes know each other by now."""
        if self.tables is not None:
            self.tables.start(self.trainer)

    def on_fit_start(self) -> None:
        """Starts the biases of the heads from the first window's labels, then takes over what a warm start has.

        A resumed run has its weights already.
        """
        if self.trainer.ckpt_path is None:
            self.start_heads(Fit(self.trainer).data)
            if self.warm_start is not None:
                self.warm_start(Fit(self.trainer))
        self.warm_start = None  # frees the parent's state
        self.start_average(self._saved_average)
        self._saved_average = None

    def start_average(self, state: Mapping[str, Any] | None) -> None:
        """Makes the moving average, from a state or from the weights; keeps the one that a warm start has made."""
        self._averaged_step = self.global_step
        if self.average_decay and self.average is None:
            self.average = WeightAverage(self.net, decay=self.average_decay)
            if state is not None:
                self.average.load_state_dict(state)

    def update_average(self) -> None:
        """Takes the weights of a step into the moving average, once per optimizer step."""
        if self.average is not None and self.global_step != self._averaged_step:
            self.average.update()
            self._averaged_step = self.global_step

    def start_heads(self, data: RankingDataModule) -> None:
        """Starts the biases of the heads from the first window's labels, if they are to start there."""
        if self._head_bias == "zero":
            return
        cast(Ranker, self.net).set_head_biases(head_constants(data))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Forward pass and loss; keeps the signals that the divergence detector and the progress bar read."""
        observe(self.net, self.trainer.optimizers[0], [batch])
        logits_BT, loss = forward_loss(self, batch)
        reduce = self.trainer.strategy.reduce  # each rank has the share of its rows
        ranking_T = None if loss.ranking_T is None else cast(Tensor, reduce(loss.ranking_T, reduce_op="mean"))
        self.see(
            Seen(
                logits_BT=logits_BT.detach(),
                labels_BT=batch.labels_BT,
                mask_BT=batch.mask_BT,
                losses_T=cast(Tensor, reduce(loss.task_T, reduce_op="mean")).detach(),
                weight_B=batch.weight_B,
                ranking_T=ranking_T,
            )
        )
        return loss.total

    def see(self, seen: Seen) -> None:
        """Takes what a batch leaves for its signals. ``training_step`` calls it, or who trains in its place."""
        self.signals = self._late.add(seen)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Scores a window on its first batch, before any of its rows is trained on."""
        if self.tables is not None:
            self.tables.use_rate(self.trainer.optimizers[0])
        if not self._progressive or batch.opening is None:
            return
        self.score(batch.opening, self.progressive_metrics)
        values = self.progressive_metrics.compute()
        self.progressive_metrics.reset()
        self.last_progressive = batch.window, values
        self.record(over_time(names.PROGRESSIVE, values) | {names.WINDOW: float(batch.window)})

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Sends what the callbacks have recorded, which were all called before."""
        self.send_rows()

    def record_step(self) -> None:
        """Writes the numbers of the last step every ``log_every`` steps; reading them waits for the device."""
        if self.signals is None:
            return
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        last = (self.global_step, self.signals, float(lr))
        if self.global_step % self.log_every:
            self._unrecorded.append(last)
            return
        self._record_signals(*last)
        admission = admission_of(self.net)
        if admission is not None:
            self.record({names.ids(name): value for name, value in admission.values().items()})

    def record_event(self, step: int) -> None:
        """Writes the numbers of a recent step, whatever ``log_every``: an event has its point in every curve."""
        for numbers in self._unrecorded:
            if numbers[0] == step:
                self._record_signals(*numbers)

    def _record_signals(self, step: int, signals: LateSignals | Recent, lr: float) -> None:
        """Writes a step's numbers."""
        losses_T, ranking_T = signals.losses_T, signals.ranking_T
        values = step_values(self.schema, losses_T.tolist(), signals.auc_T.tolist(), lr)
        if ranking_T is not None and self.loss.ranking is not None:
            trained_T = self.loss.combined(losses_T, ranking_T.to(losses_T)).tolist()
            values[names.TRAIN_LOSS] = sum(t.weight * x for t, x in zip(self.schema.tasks, trained_T, strict=True))
            for task, loss, ranked in zip(
                self.schema.tasks, ranking_T.tolist(), self.loss.ranked_T.tolist(), strict=True
            ):
                if ranked:
                    values[names.task_metric(names.TRAIN, task.name, self.loss.ranking.name)] = loss
        self.record(values, step=step)

    def on_validation_epoch_start(self) -> None:
        """Evaluates the moving average, if there is one."""
        if self.average is not None:
            self.average.swap()

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch of the hold-out."""
        self.holdout_metrics.add(self.net(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Writes the hold-out's metrics at this step."""
        self._own_weights()
        self.end_holdout(names.VAL)

    def end_holdout(self, phase: str) -> None:
        """Takes and records the metrics of the rows of the hold-out that were added.

        Args:
            phase: ``val`` or ``test``.
        """
        values = self.holdout_metrics.compute(final=phase == names.TEST)
        self.holdout_notes = self.holdout_metrics.notes
        self.holdout_tables = self.holdout_metrics.tables
        self.holdout_intervals = {f"{phase}/{name}": ends for name, ends in self.holdout_metrics.intervals.items()}
        self.holdout_metrics.reset()
        self.holdout = {f"{phase}/{name}": value for name, value in values.items()}
        self.record(over_time(phase, values), step=self.holdout_step)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch of the hold-out."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Writes the hold-out's metrics at the end of training."""
        self._own_weights()
        self.end_holdout(names.TEST)
        if self.trainer.is_global_zero:
            for name, why in self.holdout_notes.items():
                log.warning("test/%s is undefined: %s", name, why)

    def configure_optimizers(self) -> Mapping[str, object] | Optimizer:  # type: ignore[override]
        """The optimizer over all parameters, and the warm-up if there is one."""
        optimizer = self.make_optimizer()
        self._settings = settings_of(optimizer)
        if not (self._warmup_steps or self._rewarm_steps):
            return optimizer
        schedule = LambdaLR(optimizer, lambda step: self._rate(step))  # noqa: PLW0108  the schedule saves any other callable
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Factor of the learning rate at a step, from 0: the warm-up of all runs so far, times the newest one."""
        steps, again = self._warmup_steps or 1, self._rewarm_steps or 1
        earlier = int((self._before or {}).get("steps", 0))
        since = step - self.rewarm_from
        # A rollback may have gone back to before the newest warm-up, which then comes again.
        return min(1.0, (earlier + step + 1) / steps) * (min(1.0, (since + 1) / again) if since >= 0 else 1.0)

    def rewarm(self) -> None:
        """Lets the learning rate rise from 0 again over ``rewarm_steps``, from the next step on."""
        if not self._rewarm_steps:
            return
        for config in self.trainer.lr_scheduler_configs:
            schedule = cast(LambdaLR, config.scheduler)
            self.rewarm_from = schedule.last_epoch  # a rollback sets it back, and not the step of the run
            for group, base in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = base * self._rate(schedule.last_epoch)

    def make_optimizer(self, factory: OptimizerFactory | None = None) -> Optimizer:
        """A new optimizer over all parameters, by another factory than the run's if one is given."""
        made = (factory or self.optimizer_factory)(model_or_params=self.net, lr=self.lr)
        return made if self.tables is None else self.tables.join(made)

    def apply_settings(self) -> None:
        """Gives a resumed optimizer the hyperparameters that have changed since the checkpoint was written.

        A learning rate is changed by its factor: a schedule or a rollback may have changed the one in the checkpoint.
        Groups and schedules are Lightning's to restore, so this is called when it has done so.
        """
        if self._saved_settings is None:
            return
        groups = self.trainer.optimizers[0].param_groups
        for number, (before, now, group) in enumerate(zip(self._saved_settings, self._settings, groups, strict=True)):
            for name in (name for name in now if now[name] != before.get(name)):
                if name == "lr" and before["lr"]:
                    scale_lr(self.trainer, now["lr"] / before["lr"], group=number)
                else:
                    group[name] = now[name]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """The global clip. Lightning's own cannot read sparse gradients."""
        if gradient_clip_val:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            clip_gradients(params, gradient_clip_val, by_value=gradient_clip_algorithm == "value")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds each rank's training AUC (Lightning keeps that of rank 0), the optimizer's settings and recent losses.

        A resumed run may report an event that began before the checkpoint, and writes the losses of its first step.
        """
        own = self.train_auc.get_extra_state()
        by_rank = self.all_gather(own) if self.trainer.world_size > 1 else own[None]
        assert isinstance(by_rank, Tensor)
        checkpoint[TRAIN_AUC_BY_RANK] = by_rank.cpu()
        checkpoint[OPTIMIZER_SETTINGS] = self._settings
        if self.average is not None:
            checkpoint[AVERAGE] = self.average.state_dict()
            live = self.average.own_weights().items()  # in the middle of an evaluation the net has the average
            checkpoint[STATE_DICT] |= {f"{NET_PREFIX}{name}": value for name, value in live}
        if self.tables is not None:
            checkpoint[SHARDED] = self.tables.save(self.global_step)
        windows, rows, last_time_ms = Fit(self.trainer).data.trained()
        checkpoint[LINEAGE] = {
            **totals(
                steps=self.global_step, windows=windows, rows=rows, last_time_ms=last_time_ms, before=self._before
            ),
            "schema": self.schema.to_dict(),
        }
        if self._unrecorded:
            steps, signals, rates = zip(*self._unrecorded, strict=True)
            checkpoint[RECENT] = {
                "steps": list(steps),
                "lr": list(rates),
                "losses": torch.stack([_losses(x) for x in signals]).cpu(),
                "auc": torch.stack([x.auc_T for x in signals]).cpu(),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives this rank its own training AUC back; with another number of ranks, rank 0 gets the sum."""
        if self.tables is not None:
            self.tables.load(checkpoint, Path(str(self.trainer.ckpt_path)))
        self._saved_settings = checkpoint.get(OPTIMIZER_SETTINGS)
        self._saved_average = checkpoint.get(AVERAGE)
        if recent := checkpoint.get(RECENT):  # missing in older checkpoints
            for step, losses, auc_T, lr in zip(*(recent[key] for key in ("steps", "losses", "auc", "lr")), strict=True):
                losses_T, ranking_T = losses if losses.dim() == 2 else (losses, None)
                self._unrecorded.append((step, Recent(losses_T, auc_T, ranking_T), lr))
        by_rank = checkpoint.get(TRAIN_AUC_BY_RANK)
        if by_rank is None:
            return
        rank, same = self.trainer.global_rank, len(by_rank) == self.trainer.world_size
        joined = by_rank.sum(0) if rank == 0 else torch.zeros_like(by_rank[0])
        checkpoint[STATE_DICT][TRAIN_AUC] = by_rank[rank] if same else joined

    @torch.no_grad()
    def score(self, rows: Batch, metrics: TaskMetrics) -> None:
        """Adds the predictions for rows to metrics, without training on them."""
        self.net.eval()
        pieces = -(-len(rows) // self._score_rows)
        if (
            self.tables is not None or self.device_mesh is not None
        ):  # a forward pass is collective, and shares may differ
            pieces = Fit(self.trainer).largest(pieces)
        for part in _pieces(rows, self._score_rows, pieces):
            part = part.to(self.device, non_blocking=True)
            metrics.add(self.net(part), part)
        self.net.train()

    def record(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        """Sends numbers to every tracker under the step they belong to; None for the last step.

        While a batch ends, all numbers of a step are collected, and sent as one row: W&B hands each row to a thread.
        """
        step = self.global_step if step is None else step
        if self._rows is None:
            self._send(step, values)
        else:
            self._rows.setdefault(step, {}).update(values)

    def collect_rows(self) -> None:
        """Keeps what is recorded from now on until ``send_rows``."""
        self._rows = {}

    def send_rows(self, *, keep_on: bool = False) -> None:
        """Sends what was kept. ``keep_on``: and keeps what is recorded afterwards."""
        rows, self._rows = self._rows, {} if keep_on and self._rows is not None else None
        for step, values in (rows or {}).items():
            self._send(step, values)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), step=step)

    def _own_weights(self) -> None:
        """Gives the net its own weights back after an evaluation of the average."""
        if self.average is not None and self.average.swapped:
            self.average.swap()


class Recent(NamedTuple):
    """What a checkpoint keeps of the signals of a recent step; see ``StepSignals``."""

    losses_T: Tensor
    auc_T: Tensor
    ranking_T: Tensor | None


def head_constants(data: RankingDataModule) -> Tensor:
    """The logit of each task that fits the labels of the first window best, shape [T]; the same on each rank."""
    start, stop = data.plan.rows(0)
    rows = data.log.read(start, min(stop, start + _ROWS_FOR_HEAD_BIASES))
    return best_constants(data.log.schema, rows.labels_BT, rows.mask_BT, rows.weight_B)


def _losses(signals: LateSignals | Recent) -> Tensor:
    """The losses of a step, [T], or [2, T] with the ranking losses."""
    both = signals.losses_T, signals.ranking_T
    return both[0] if both[1] is None else torch.stack([both[0], both[1]])


def _pieces(rows: Batch, size: int, count: int) -> Iterator[Batch]:
    """Rows in a number of pieces of a size; the last ones may be empty."""
    for start in range(0, count * size, size):
        yield rows.slice(min(start, len(rows)), min(start + size, len(rows)))
