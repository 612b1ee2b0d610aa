"""Trains a group of jobs as one: the loop, and when a replica leaves it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from ranker import stop_signals
from ranker.data.batch import Batch
from ranker.errors import UserError
from ranker.losses import MultitaskLoss
from ranker.models.admission import admission_of
from ranker.models.embeddings import EmbeddingTables
from ranker.parts import open_log
from ranker.runs.metric_names import TEST, VAL
from ranker.training.touched_rows import large_tables
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

    A replica whose model is lost is evaluated, gets its summary and leaves the group; the others do not notice.
    Checkpoints are those of the runs alone, so a group that was killed goes on from them.

    Args:
        jobs: the jobs, of one key (``alike.key_of``). All begin anew, or have a checkpoint of the same step.
        order: what the summaries say of the order of rows inside a window.
        order_seed: the seed of this order; None: each job's own.
        ended: called with each job that has its summary.
        say: shows a line.

    Raises:
        CannotStackError: the jobs must run alone. Nothing was trained.
        Stopped: a signal asked to stop, and the jobs have their checkpoints.
    """
    with stop_signals.gentle_after_start():
        _train(_Group(jobs, order=order, order_seed=order_seed, ended=ended), len(jobs), say)


def _train(group: _Group, jobs: int, say: Say) -> None:
    said = started = time.monotonic()
    first = group.taken
    group.begin()
    for batches in () if group.is_over else group.feed:
        group.step(batches)
        if group.is_over:
            break
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            alive, rate = len(group.replicas), (group.taken - first) * len(batches[0]) / (said - started)
            say(f"step {group.taken} of {group.steps}, {alive} of {jobs} replicas, {alive * rate:,.0f} examples/s")
    group.end(range(len(group.replicas)))


class _Group:
    """Replicas in training, from the first step to the last."""

    def __init__(self, jobs: Sequence[Job], *, order: str, order_seed: int | None, ended: Ended) -> None:
        first = jobs[0].cfg
        self._started = time.perf_counter()
        self._signal = 0  # that ends the group, as it was when the last step was made
        self._ended, self._order, self._order_seed = ended, order, order_seed
        if first.train.threads:
            torch.set_num_threads(first.train.threads)
        self.log = open_log(first)
        if self.log.schema.weight:
            raise CannotStackError("the log has row weights")
        self.feed = Feed(self.log, first, [job.cfg.seed for job in jobs], order_seed)
        self.replicas = self._built(jobs)
        self._size = len(self.replicas)
        starts = [_table_starts(replica) for replica in self.replicas]
        _check_memory(self.replicas)
        self._val = self.feed.data[0].val_dataloader()
        self._eval_every = first.train.eval_every
        for replica in self.replicas:
            replica.begin(self.log)
        limit, batches = first.train.max_steps, self.feed.data[0].num_batches
        self.steps = min(limit, batches) if limit > 0 else batches
        self.taken, self._checked = self.replicas[0].steps, False
        self._examples, self._seconds = 0, 0.0
        self._stack(starts)
        self._loss = MultitaskLoss(self.log.schema)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return self.taken >= self.steps or not self.replicas

    def begin(self) -> None:
        """Makes up for what a killed group did not come to: an evaluation, and the end of replicas that were lost."""
        evaluate([replica for replica in self.replicas if replica.wants_evaluation], self._val, phase=VAL)
        self.end([k for k, replica in enumerate(self.replicas) if replica.lost])

    def step(self, batches: Sequence[Batch]) -> None:
        """Trains every replica on its batch, and lets those leave that are lost.

        Raises:
            Stopped: a signal asked for it.
        """
        start = time.perf_counter()
        if not self._checked:
            self._check(batches)
        self._update(batches)
        self._seconds += time.perf_counter() - start
        if self._signal:
            for replica in self.replicas:
                replica.interrupted(time.perf_counter() - self._started)
            raise stop_signals.Stopped
        lost = [k for k, replica in enumerate(self.replicas) if replica.lost]
        if self._eval_every:
            due = self.taken % self._eval_every == 0
            evaluate([r for k, r in enumerate(self.replicas) if due or k in lost], self._val, phase=VAL)
        self.end(lost)

    def end(self, which: Sequence[int]) -> None:
        """Evaluates replicas, writes their summaries and drops them."""
        leaving = [self.replicas[k] for k in which]
        if not leaving:
            return
        for replica in leaving:
            replica.end_of_training()
        evaluate(leaving, self.feed.data[0].test_dataloader(), phase=TEST)
        for replica in leaving:
            summary = replica.finish(round(time.perf_counter() - self._started, 1), self._measured(replica))
            self._ended(replica.job, summary)
        self._keep([k for k in range(len(self.replicas)) if k not in which])

    def _built(self, jobs: Sequence[Job]) -> list[Replica]:
        """The replicas of the jobs that can be built. The others run alone, and say in their summaries why they fail.

        Raises:
            CannotStackError: there is none.
        """
        replicas, kept, reason = [], [], ""
        for k, job in enumerate(jobs):
            try:
                replicas.append(Replica(job, self.log, self.feed.of(k), lambda: self._signal))
                kept.append(k)
            except UserError as error:
                reason = str(error)
        if not replicas:
            raise CannotStackError(reason)
        self.feed.keep(kept)
        return replicas

    def _measured(self, replica: Replica) -> dict[str, Any]:
        seconds, waited = self._seconds + self.feed.waited, self.feed.waited
        seed = replica.job.cfg.seed if self._order_seed is None else self._order_seed
        return {
            # Of this replica. All of the group together are up to ``vectorized`` times as fast.
            "examples_per_second": round(self._examples / seconds, 1) if seconds else 0.0,
            "data_wait_fraction": round(waited / seconds, 4) if seconds else 0.0,
            "vectorized": self._size,
            "vectorized_order": self._order,
            "order_seed": seed,
        }

    def _stack(self, starts: Sequence[dict[int, float]]) -> None:
        optimizers = [replica.optimizer for replica in self.replicas]
        self.optimizer = StackedOptimizer(optimizers, [r.job.cfg.train.warmup_steps for r in self.replicas])
        nets = [replica.net for replica in self.replicas]
        self.tables = StackedTables([cast(EmbeddingTables, net.embeddings) for net in nets], optimizers, starts)
        try:
            self.layers = StackedLayers(nets)
        except Exception as error:  # a model of the user's own may not be copied
            raise CannotStackError(f"the model cannot be stacked: {_first_line(error)}") from error

    def _check(self, batches: Sequence[Batch]) -> None:
        """Compares the stacked model with the replicas' own nets: a model of the user's own may do anything."""
        self._checked = True
        with torch.no_grad():
            try:
                stacked_KBT = self._logits(batches)
            except Exception as error:
                raise CannotStackError(f"the model does not run under vmap: {_first_line(error)}") from error
            for replica, batch, logits_BT in zip(self.replicas, self._each(batches), stacked_KBT, strict=True):
                own_BT = replica.net(batch)
                if not torch.allclose(own_BT, logits_BT, rtol=1e-3, atol=1e-5, equal_nan=True):
                    raise CannotStackError("the model gives other predictions when it is stacked")

    def _logits(self, batches: Sequence[Batch]) -> Tensor:
        """Logits [K, B, T]."""
        dense = [batch.dense_BF for batch in batches]
        return self.layers.forward(dense[0] if len(dense) == 1 else torch.stack(dense), self.tables.look_up(batches))

    def _each(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batch of each replica."""
        return batches if len(batches) > 1 else [batches[0]] * len(self.replicas)

    def _update(self, batches: Sequence[Batch]) -> None:
        """One optimizer step of every replica, and what a run does around it."""
        pairs = list(zip(self.replicas, self._each(batches), strict=True))
        for replica, batch in pairs:
            replica.before_step(batch)
        logits_KBT = self._logits(batches)
        labels_KBT, mask_KBT = (
            torch.stack([getattr(batch, name) for batch in batches]).expand(len(self.replicas), -1, -1)
            for name in ("labels_BT", "mask_BT")
        )
        total, losses_KT = _losses(self._loss, logits_KBT, labels_KBT, mask_KBT)
        for replica, batch in pairs:
            replica.before_backward(batch, total)
        layers, tables = self.layers.leaves(), self.tables.leaves()
        grads = torch.autograd.grad(total, [*layers, *tables], allow_unused=True)
        total = total.detach()
        self.layers.give_gradients(grads[: len(layers)])
        for replica in self.replicas:
            replica.before_optimizer_step()
        self.tables.show_touched(self.optimizer.optimizer, [g for g in grads[len(layers) :] if g is not None])
        self.optimizer.step()
        self.tables.write_back(self.optimizer.optimizer)
        self.optimizer.share_state()
        self.taken += 1
        self._examples += len(batches[0])
        self._signal = stop_signals.received()
        for (replica, batch), logits_BT, losses_T in zip(pairs, logits_KBT.detach(), losses_KT.detach(), strict=True):
            replica.after_step(batch, logits_BT, losses_T, total)

    def _keep(self, replicas: Sequence[int]) -> None:
        if replicas:
            self.layers.keep(replicas)
            self.tables.keep(replicas)
            self.optimizer.keep(replicas)
            self.feed.keep(replicas)
        self.replicas = [self.replicas[k] for k in replicas]


def _table_starts(replica: Replica) -> dict[int, float]:
    """The initial accumulator of each table, by width.

    Raises:
        CannotStackError: the model cannot be trained in a group.
    """
    if why := unlike(replica.net):
        raise CannotStackError(why)
    if admission_of(replica.net) is not None:
        raise CannotStackError("a table counts its ids (admit_after or evict_after_days)")
    callbacks, train = replica.job.cfg.callbacks, replica.job.cfg.train
    ring = callbacks.get("snapshots")
    for name, megabytes in (
        ("train.checkpoint_rows_above", train.get("checkpoint_rows_above") if train.checkpoint_every else 0),
        ("callbacks.snapshots.rows_above", ring.get("rows_above") if ring and ring.every and not ring.disk else 0),
    ):
        if large_tables(replica.net, megabytes or 0):
            raise CannotStackError(f"a table with sparse gradients takes more than {name}={megabytes:g} MB")
    tables: dict[int, Tensor] = {table.shape[1]: table for table in replica.net.embeddings.parameters()}
    found = table_starts(replica.module.make_optimizer(), tables)
    if isinstance(found, str):
        raise CannotStackError(found)
    return found


def _check_memory(replicas: Sequence[Replica]) -> None:
    """Refuses snapshots that do not fit beside each other, of which each run checks its own alone.

    Raises:
        CannotStackError: they do not fit.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = sum(
        2 * sum(p.nbytes for p in replica.net.parameters()) * (2 + replica.run.stability.kept_snapshots)
        for replica in replicas
    )
    if needed > there:
        raise CannotStackError(
            f"{len(replicas)} replicas and their snapshots take {needed / 2**30:,.1f} GiB of the {there / 2**30:,.0f} "
            "GiB of this machine; lower callbacks.snapshots.keep or sweep.vectorize"
        )


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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
