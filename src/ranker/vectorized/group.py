"""Trains a group of jobs as one: the loop, and when a replica leaves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from ranker.build import open_log
from ranker.data.batch import Batch
from ranker.data.log import Log
from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.losses import MultitaskLoss
from ranker.metrics import StreamingAUC
from ranker.models.admission import admission_of
from ranker.models.embeddings import EmbeddingTables
from ranker.runs import lineage
from ranker.runs.metric_names import TEST, VAL
from ranker.stability.detector_interface import Signals
from ranker.training.module import head_constants
from ranker.vectorized.feed import Feed
from ranker.vectorized.kernels import AsAlone
from ranker.vectorized.replica import Job, Replica, evaluate
from ranker.vectorized.stack import StackedLayers
from ranker.vectorized.steps import StackedOptimizer, table_starts, unlike
from ranker.vectorized.tables import StackedTables

SAY_SECONDS = 15.0
Ended = Callable[[Job, dict[str, Any]], None]
Say = Callable[[str], None]


class CannotStackError(Exception):
    """These jobs must run alone; the message says why."""


def train(jobs: Sequence[Job], *, order: str, order_seed: int | None, ended: Ended, say: Say) -> None:
    """Trains jobs that ``alike`` allows to be trained as one, and leaves a run folder of each.

    A replica whose model is lost is evaluated, gets its summary and leaves the group; the others do not notice. A
    group writes no checkpoints: what is killed starts again.

    Args:
        jobs: the jobs, of one key (``alike.key_of``).
        order: what the summaries say of the order of rows inside a window.
        order_seed: the seed of this order; None: each job's own.
        ended: called with each job that has its summary.
        say: shows a line.

    Raises:
        CannotStackError: the jobs must run alone. Nothing was trained.
    """
    group = _Group(jobs, order=order, order_seed=order_seed, ended=ended)
    said, started = time.monotonic(), time.monotonic()
    for batches in group.feed:
        group.step(batches)
        if group.is_over:
            break
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            alive, rate = len(group.replicas), group.taken * len(batches[0]) / (said - started)
            say(f"step {group.taken} of {group.steps}, {alive} of {len(jobs)} replicas, {alive * rate:,.0f} examples/s")
    group.end(range(len(group.replicas)))


class _Group:
    """Replicas in training, from the first step to the last."""

    def __init__(self, jobs: Sequence[Job], *, order: str, order_seed: int | None, ended: Ended) -> None:
        first = jobs[0].cfg
        self._started = time.perf_counter()
        self._ended, self._order, self._order_seed = ended, order, order_seed
        if first.train.threads:
            torch.set_num_threads(first.train.threads)
        self.log = open_log(first)
        if self.log.schema.weight:
            raise CannotStackError("the log has row weights")
        self.replicas = _built(jobs, self.log)
        self._size = len(self.replicas)
        seeds = [replica.job.cfg.seed for replica in self.replicas] if order_seed is None else [order_seed]
        self.feed = Feed(self.log, first, seeds)
        self._val = self.feed.data[0].val_dataloader()
        self._eval_every = first.train.eval_every
        limit, batches = first.train.max_steps, self.feed.data[0].num_batches
        self.steps = min(limit, batches) if limit > 0 else batches
        self.taken = self._examples = 0
        self._seconds = 0.0
        self._start_heads()
        self._stack()
        for replica in self.replicas:
            replica.begin(self.log, self.optimizer.optimizer)
        self._loss = MultitaskLoss(self.log.schema)
        self._share_columns(None)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return self.taken >= self.steps or not self.replicas

    def step(self, batches: Sequence[Batch]) -> None:
        """Trains every replica on its batch, and lets those leave that are lost."""
        start = time.perf_counter()
        if self.taken == 0:
            self._check(batches)
        for k, replica in enumerate(self.replicas):
            replica.before_step(batches[k if len(batches) > 1 else 0], self.taken)
        self._update(batches)
        self._seconds += time.perf_counter() - start
        lost = [k for k, replica in enumerate(self.replicas) if replica.lost]
        if self._eval_every:
            due = self.taken % self._eval_every == 0
            chosen = [replica for replica in self.replicas if due or replica.lost]
            if chosen:
                evaluate(chosen, self._val, phase=VAL, step=self.taken)
        if lost:
            self.end(lost)

    def end(self, which: Sequence[int]) -> None:
        """Evaluates replicas, writes their summaries and drops them."""
        leaving = [self.replicas[k] for k in which]
        if not leaving:
            return
        for replica in leaving:
            replica.end_of_training(self.taken)
        evaluate(leaving, self.feed.data[0].test_dataloader(), phase=TEST, step=self.taken)
        for replica in leaving:
            summary = replica.finish(
                optimizer=self.optimizer.optimizer, step=self.taken, measured=self._measured(replica)
            )
            self._ended(replica.job, summary)
        self._keep([k for k in range(len(self.replicas)) if k not in which])

    def _measured(self, replica: Replica) -> dict[str, Any]:
        seconds, waited = self._seconds + self.feed.waited, self.feed.waited
        seed = replica.job.cfg.seed if self._order_seed is None else self._order_seed
        return {
            "steps": self.taken,
            "examples": self._examples,
            "bad_rows": self.log.num_bad_rows,
            # Of this replica. All of the group together are up to ``vectorized`` times as fast.
            "examples_per_second": round(self._examples / seconds, 1) if seconds else 0.0,
            "data_wait_fraction": round(waited / seconds, 4) if seconds else 0.0,
            "seconds": round(time.perf_counter() - self._started, 1),
            "world_size": 1,
            "last_row_time": lineage.iso(self.feed.data[0].trained()[2]),
            "vectorized": self._size,
            "vectorized_order": self._order,
            "order_seed": seed,
        }

    def _start_heads(self) -> None:
        wanting = [replica for replica in self.replicas if replica.job.cfg.train.head_bias != "zero"]
        if wanting:
            logits_T = head_constants(self.feed.data[0])  # read once
            for replica in wanting:
                replica.net.set_head_biases(logits_T)

    def _stack(self) -> None:
        starts = []
        for replica in self.replicas:
            if why := unlike(replica.net):
                raise CannotStackError(why)
            if admission_of(replica.net) is not None:
                raise CannotStackError("a table counts its ids (admit_after or evict_after_days)")
            tables: dict[int, Tensor] = {table.shape[1]: table for table in replica.net.embeddings.parameters()}
            found = table_starts(replica.own_optimizer, tables)
            if isinstance(found, str):
                raise CannotStackError(found)
            starts.append(found)
        self.optimizer = StackedOptimizer(
            [replica.own_optimizer for replica in self.replicas],
            [replica.job.cfg.train.warmup_steps for replica in self.replicas],
        )
        nets = [replica.net for replica in self.replicas]
        self.tables = StackedTables([cast(EmbeddingTables, net.embeddings) for net in nets], starts)
        try:
            self.layers = StackedLayers(nets)
        except Exception as error:  # a model of the user's own may not be copied
            raise CannotStackError(f"the model cannot be stacked: {_first_line(error)}") from error

    def _check(self, batches: Sequence[Batch]) -> None:
        """Compares the stacked model with the replicas' own nets: a model of the user's own may do anything."""
        with torch.no_grad():
            try:
                stacked_KBT = self._logits(batches)
            except Exception as error:
                raise CannotStackError(f"the model does not run under vmap: {_first_line(error)}") from error
            for k, (replica, logits_BT) in enumerate(zip(self.replicas, stacked_KBT, strict=True)):
                own_BT = replica.net(batches[k if len(batches) > 1 else 0])
                if not torch.allclose(own_BT, logits_BT, rtol=1e-3, atol=1e-5, equal_nan=True):
                    raise CannotStackError("the model gives other predictions when it is stacked")

    def _logits(self, batches: Sequence[Batch]) -> Tensor:
        """Logits [K, B, T]."""
        dense = [batch.dense_BF for batch in batches]
        return self.layers.forward(dense[0] if len(dense) == 1 else torch.stack(dense), self.tables.look_up(batches))

    def _update(self, batches: Sequence[Batch]) -> None:
        """One optimizer step of every replica, and what their detectors make of it."""
        logits_KBT = self._logits(batches)
        labels_KBT, mask_KBT = (
            torch.stack([getattr(batch, name) for batch in batches]).expand(len(self.replicas), -1, -1)
            for name in ("labels_BT", "mask_BT")
        )
        total, losses_KT = _losses(self._loss, logits_KBT, labels_KBT, mask_KBT)
        layers, tables = self.layers.leaves(), self.tables.leaves()
        grads = torch.autograd.grad(total, [*layers, *tables], allow_unused=True)
        self.layers.give_gradients(grads[: len(layers)])
        self.optimizer.set_rates(self.taken)
        self.tables.show_touched(self.optimizer.optimizer, [g for g in grads[len(layers) :] if g is not None])
        self.optimizer.step()
        self.tables.write_back(self.optimizer.optimizer)
        self.taken += 1
        self._examples += len(batches[0])
        self.optimizer.set_rates(self.taken)
        columns = map(_columns, (logits_KBT.detach(), labels_KBT, mask_KBT))
        signals = self._signals(*columns, losses_C=losses_KT.flatten())
        for k, (replica, own) in enumerate(zip(self.replicas, signals, strict=True)):
            replica.after_step(self.taken, own, self.optimizer.rate_of(k))

    def _signals(self, logits_BC: Tensor, labels_BC: Tensor, mask_BC: Tensor, *, losses_C: Tensor) -> Iterator[Signals]:
        """The signals of each replica: those of a step alone, computed in one pass over the columns of all."""
        self._auc.update(logits_BC, labels_BC, mask_BC)
        stats = self._auc.stats()
        count = len(self.replicas)
        nonfinite_K = stats.nonfinite_T.view(count, -1).sum(1) > 0
        columns = (losses_C, stats.auc_T, stats.spread_T, stats.batch_auc_T, stats.positives_T, stats.labels_T)
        by_replica = [column.view(count, -1).unbind() for column in (*columns, stats.variance_T)]
        for replica, nonfinite, parts in zip(self.replicas, nonfinite_K, zip(*by_replica, strict=True), strict=True):
            losses_T, auc_T, spread_T, batch_auc_T, positives_T, labels_T, variance_T = parts
            cut = replica.detector.step_cut if replica.detector else None
            yield {
                "losses_T": losses_T,
                "auc_T": auc_T,
                "spread_T": spread_T,
                "nonfinite": nonfinite,
                "batch_auc_T": batch_auc_T,
                "positives_T": positives_T,
                "labels_T": labels_T,
                "variance_T": variance_T,
                "step_cut_3": cut.update() if cut else None,
            }

    def _share_columns(self, histograms: Tensor | None) -> None:
        """Makes the running AUC, whose columns are the tasks of all replicas side by side."""
        self._auc = StreamingAUC(_repeated(self.log.schema, len(self.replicas)))
        if histograms is not None:
            self._auc.set_extra_state(histograms)

    def _keep(self, replicas: Sequence[int]) -> None:
        dropped = [
            parameter
            for k, replica in enumerate(self.replicas)
            if k not in replicas
            for parameter in replica.net.parameters()
        ]
        if replicas:
            self.layers.keep(replicas)
            self.tables.keep(replicas)
            self.optimizer.keep(replicas, dropped)
            self.feed.keep(replicas)
            state = self._auc.get_extra_state()
            state = state.view(len(self.replicas), -1, *state.shape[1:])[list(replicas)]
        self.replicas = [self.replicas[k] for k in replicas]
        if replicas:
            self._share_columns(state.flatten(0, 1))


def _built(jobs: Sequence[Job], log: Log) -> list[Replica]:
    """The replicas of the jobs that can be built. The others run alone, and say in their own summaries why they fail.

    Raises:
        CannotStackError: there is none.
    """
    replicas, reason = [], ""
    for job in jobs:
        try:
            replicas.append(Replica(job, log))
        except UserError as error:
            reason = str(error)
    if not replicas:
        raise CannotStackError(reason)
    return replicas


def _losses(loss: MultitaskLoss, logits_KBT: Tensor, labels_KBT: Tensor, mask_KBT: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the replicas' losses, which has the gradient of each, and the losses of their tasks [K, T]."""

    def one(logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        found = loss.local(logits_BT, labels_BT, mask_BT, counts_T=mask_BT.sum(0))
        return found.total, found.task_T

    if len(logits_KBT) == 1:
        total, losses_T = one(logits_KBT[0], labels_KBT[0], mask_KBT[0])
        return total, losses_T[None]
    with AsAlone():
        total_K, losses_KT = vmap(one)(logits_KBT, labels_KBT, mask_KBT)
    return total_K.sum(), losses_KT


def _columns(values_KBT: Tensor) -> Tensor:
    """The tasks of all replicas side by side, [B, K * T]."""
    return values_KBT.transpose(0, 1).flatten(1)


def _repeated(schema: Schema, times: int) -> Schema:
    """The schema with the tasks of every replica."""
    return replace(
        schema, tasks=tuple(replace(task, name=f"{k}_{task.name}") for k in range(times) for task in schema.tasks)
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
