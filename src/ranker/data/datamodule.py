"""The Lightning data module of a log: loaders for training and evaluation, and the position in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from ranker.data.batch import Batch
from ranker.data.dense_statistics import MODES, NOTHING, DenseStatistics, Mode, PastWindows
from ranker.data.loader import EvalLoader, WindowedLoader
from ranker.data.log import Log
from ranker.data.repeated import Repeated, in_one_pass, repeated_plan
from ranker.data.windows import Positions, WindowPlan, parse_window, plan_windows, row_ranges
from ranker.errors import UserError, one_of, suggest


class RankingDataModule(pl.LightningDataModule):
    """Trains on a log's training rows through a moving window and evaluates on its hold-out.

    The position in the training order is part of a checkpoint. A resumed run draws exactly the batches that the
    interrupted run had not trained on. The training loop must call ``advance`` after each batch, before a checkpoint
    can be written.

    Attributes:
        log: the log. A factory is called on first use.
        position: number of the next batch to train on, counted over all ranks from the start of the run.
        order_seed: as given, or of the checkpoint.
    """

    def __init__(
        self,
        log: Log | Callable[[], Log],
        *,
        batch_size: int,
        eval_batch_size: int | None = None,
        window: int | str = 16_384,
        seed: int = 0,
        order_seed: int | None = None,
        num_workers: int = 1,
        eval_max_rows: int | None = None,
        progressive: bool = False,
        pin_memory: bool | None = None,
        dense_statistics: Mode = "none",
        passes: int = 1,
        keep_groups: str | None = None,
        windows_before: int = 0,
        strips: int = 1,
        wrap_training: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda loader: loader,
    ) -> None:
        """Reads nothing yet.

        Args:
            log: the log, or a function that opens it.
            batch_size: rows per step, over all ranks.
            eval_batch_size: rows per evaluation batch, over all ranks. None: batch_size.
            window: rows, or hours such as ``6h``, inside which batches are drawn at random.
            seed: seed of the order inside each window.
            order_seed: another seed that takes its place, for a run that shares its order with others. Checkpoints
                keep it, and a run that resumes from one goes on with it.
            num_workers: threads that prefetch. 0 reads in the caller's thread.
            eval_max_rows: approximate number of hold-out rows for evaluations during training. None for all.
            progressive: attach each window to its first batch, so that it is scored before the model trains on it.
            pin_memory: pin batches. None: pin if the trainer uses a GPU.
            dense_statistics: ``past_windows`` normalises dense features with mean and standard deviation of the windows
                before the current one. Evaluations use the statistics before the window of the next batch.
            passes: how often the training rows are trained on. Only the first pass is scored before it is trained on.
            keep_groups: name of a group of the schema. Rows of one group in a window come side by side, so they are in
                the same batch and on the same rank, but for the group that the border of a batch cuts.
            windows_before: number of windows of the runs that this one continues, see ``WindowPlan``.
            strips: number of parts of a window that ranks share out for reading, see ``WindowPlan``. With 1 each rank
                reads each window whole.
            wrap_training: wraps the training loader, for example to time it.

        Raises:
            UserError: a number is out of range, the window is neither rows nor hours, or there is no such group.
        """
        super().__init__()
        sizes = {
            "passes": passes,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "eval_max_rows": eval_max_rows,
            "data.strips": strips,
        }
        for name, value in sizes.items():
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"{name} must be a whole number such as 1000 (not 1e3 or 1000.0), got {value!r}")
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {num_workers}")
        one_of(dense_statistics, MODES, "data.dense_statistics")
        if strips > 1 and (dense_statistics != "none" or keep_groups is not None):
            other = "keep_groups" if keep_groups is not None else f"dense_statistics={dense_statistics}"
            raise UserError(
                f"data.strips={strips}: data.{other} needs whole windows, which no rank reads; use strips=1"
            )
        parse_window(window)
        if not (isinstance(log, Log) or callable(log)):
            raise UserError(f"data.log: {type(log).__name__} is not a log; make it a subclass of ranker.data.log.Log")
        self._log, self._keep_groups, self._passes = log, keep_groups, passes
        if isinstance(log, Log):
            self._check_log(log)
        if strips > 1 and batch_size < 4 * strips:
            raise UserError(
                f"data.strips={strips} needs batches of {4 * strips} rows or more, scale.batch_size is {batch_size}"
            )
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size or batch_size
        self._window, self._seed, self.order_seed = window, seed, order_seed
        self._num_workers, self._eval_max_rows = num_workers, eval_max_rows
        self._progressive = progressive
        self._pin_memory = pin_memory
        self._windows_before, self._strips = windows_before, strips
        self._past = PastWindows() if dense_statistics == "past_windows" else None
        self._loader: WindowedLoader | None = None
        self.position = 0
        self._wrap_training = wrap_training

    @cached_property
    def log(self) -> Log:
        """The log."""
        if isinstance(self._log, Log):
            return self._log
        opened = self._log()
        self._check_log(opened)
        return opened

    @cached_property
    def plan(self) -> WindowPlan:
        """The windows and batches of the whole run."""
        first = replace(self._first_pass, windows_before=self._windows_before, strips=self._strips)
        return repeated_plan(first, self._passes)

    @cached_property
    def _first_pass(self) -> WindowPlan:
        return plan_windows(self.log, window=self._window, batch_size=self._batch_size)

    @property
    def num_batches(self) -> int:
        """Number of batches of the whole run."""
        return self.plan.num_batches

    def advance(self, batch: Batch | None = None) -> None:
        """Records that a batch was trained on.

        Args:
            batch: the batch. None stands for the one at ``position``. After a ``skip`` it must be given, because
                batches that the trainer has already fetched may still come first.
        """
        self.position = self.position + 1 if batch is None else batch.number + 1

    def skip(self, batches: int) -> None:
        """Skips the next batches, also of the loader in use. A negative number goes back and draws batches again.

        A trainer that fetches ahead may still use batches that it already holds. ``Batch.number`` identifies them.

        Raises:
            UserError: the new position is before the first batch.
        """
        if self.position + batches < 0:
            raise UserError(f"cannot go back {-batches} batches from batch {self.position}")
        if self._past is not None:
            self._past.keep_until(self._window_of(self.position - 1) + 1 if self.position else 0)
        self.position = min(self.position + batches, self.num_batches)
        if self._loader is not None:
            self._loader.seek(self.position)

    def train_dataloader(self) -> Iterable[Batch]:
        """Loader of the remaining training batches, from ``position`` on.

        Raises:
            UserError: there are more ranks than strips.
        """
        rank, world_size = self._place()
        if 1 < self._strips < world_size:
            raise UserError(f"data.strips={self._strips} is less than the {world_size} ranks; use a multiple of them")
        self._loader = WindowedLoader(
            self._trained(),
            plan=self.plan,
            seed=self._order_of,
            rank=rank,
            world_size=world_size,
            start_batch=self.position,
            num_workers=self._num_workers,
            opening=self._progressive,
            new_windows=self._first_pass.num_windows,
            pin_memory=self._pinned(),
            past=self._past,
            keep_group=self._keep_groups,
        )
        return self._wrap_training(self._loader)

    def val_dataloader(self) -> EvalLoader:
        """Loader of part of the hold-out, spread evenly over it and cached in memory."""
        return self._eval_loader(max_rows=self._eval_max_rows, keep=self._eval_max_rows is not None)

    def test_dataloader(self) -> EvalLoader:
        """Loader of the whole hold-out."""
        return self._eval_loader(max_rows=None, keep=False)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:  # noqa: ARG002
        """Moves a batch. The copy is asynchronous if the batch's memory is pinned."""
        return batch.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        state: dict[str, Any] = {"position": self.position}
        if self.order_seed is not None:
            state["order_seed"] = self.order_seed
        # Reading threads may add entries meanwhile. This does no harm, because a row group counts once.
        bad = list(self.log.bad_rows.items())
        if bad:
            state["bad_rows"] = [[file, group, rows] for (file, group), rows in bad]
        if self._past is not None:
            state["dense_statistics"] = self.known().state_dict()
            if self._past.carried:
                state["carried_statistics"] = True
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of a checkpoint.

        Raises:
            UserError: the checkpoint was written with another value of dense_statistics.
        """
        self.position = int(state_dict["position"])
        self.order_seed = state_dict.get("order_seed", self.order_seed)
        self.log.bad_rows.update({(file, group): rows for file, group, rows in state_dict.get("bad_rows", ())})
        known = state_dict.get("dense_statistics")
        if (known is None) != (self._past is None):
            wrote = "none" if known is None else "past_windows"
            raise UserError(f"the checkpoint was written with data.dense_statistics={wrote}; use the same value")
        if self._past is not None and known is not None:
            carried = bool(state_dict.get("carried_statistics"))
            self._past.begin(self._window_of(self.position), DenseStatistics.from_state(known), carried=carried)

    def carry_statistics(self, known: DenseStatistics) -> None:
        """Puts the statistics of an earlier run before the first window. Call it before training starts."""
        if self._past is not None and known.rows:
            self._past.begin(0, known, carried=True)

    def trained(self) -> tuple[int, int, int | None]:
        """What was trained on up to ``position``: windows (begun ones count) and rows, of this run and those before it.

        Returns:
            Number of windows, including those of the runs before. Number of rows of this run. Time of the last row of
            the last window, Unix milliseconds; None before the first batch.
        """
        if not self.position:
            return self._windows_before, 0, None
        window, place = self.plan.locate(self.position - 1)
        start, stop = self.plan.rows(window)
        rows = min(start + (place + 1) * self.plan.batch_size, stop)
        last_ms = self.log.time_at_row((stop - 1) % self.log.train_rows)
        return self._windows_before + window + 1, rows, last_ms

    @property
    def at_window_end(self) -> bool:
        """Whether the batch before ``position`` was the last of its window."""
        return self.position > 0 and self._window_of(self.position) > self._window_of(self.position - 1)

    def join_bad_rows(self) -> None:
        """Adds the bad rows that other ranks found in their parts of the hold-out. All ranks must call it."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        bad = self.log.bad_rows
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, dict(bad))
        for others in by_rank:
            bad.update(others)

    def go_back(self, state_dict: dict[str, Any]) -> None:
        """Restores another state of this run while the loader is in use. Prefetched batches are dropped.

        Raises:
            UserError: as ``load_state_dict``.
        """
        self.load_state_dict(state_dict)
        if self._loader is not None:
            self._loader.seek(self.position)

    def row_ranges(self, start: int, stop: int) -> Positions:
        """Rows of the log in batches start .. stop - 1, over all ranks. See ``windows.row_ranges``."""
        ranges = row_ranges(self.plan, start=start, stop=stop, order=self._order)
        return ranges if self._passes == 1 else in_one_pass(ranges, self.log.train_rows)

    def known(self) -> DenseStatistics:
        """The statistics that normalise dense features at the next batch. Empty if they are not normalised."""
        return NOTHING if self._past is None else self._past.before(self._window_of(self.position))

    @property
    def _order_of(self) -> int:
        """The seed of the order in use."""
        return self._seed if self.order_seed is None else self.order_seed

    def _trained(self) -> Log:
        """The training rows of all passes."""
        return Repeated(self.log, self._passes) if self._passes > 1 else self.log

    def _order(self, window: int, start: int, stop: int) -> Positions:
        """The order in which batches take the rows of a window. Keys of groups are read again."""
        keys = None
        if self._keep_groups is not None:
            groups_BG = self._trained().read(start, stop).groups_BG
            assert groups_BG is not None
            keys = groups_BG[:, self.log.schema.group_names.index(self._keep_groups)].numpy()
        return self.plan.order(window, seed=self._order_of, keys=keys)

    def _check_log(self, log: Log) -> None:
        known = log.schema.group_names
        if self._keep_groups is not None and self._keep_groups not in known:
            raise UserError(f"data.keep_groups: no group '{self._keep_groups}'; {suggest(self._keep_groups, known)}")
        evicting = [feature.name for feature in log.schema.categorical if feature.evict_after_days]
        if evicting and self._passes > 1:
            raise UserError(
                f"evict_after_days of '{evicting[0]}' needs train.epochs=1: a second pass goes back in time, and every "
                "row would look forgotten"
            )

    def _eval_loader(self, *, max_rows: int | None, keep: bool) -> EvalLoader:
        rank, world_size = self._place()
        return EvalLoader(
            self.log,
            start=self.log.train_rows,
            stop=self.log.num_rows,
            batch_size=self._eval_batch_size,
            max_rows=max_rows,
            rank=rank,
            world_size=world_size,
            num_workers=self._num_workers,
            keep=keep,
            pin_memory=self._pinned(),
            statistics=self.known,
        )

    def _window_of(self, batch: int) -> int:
        """The window of a batch. After the last batch, the number of windows."""
        return self.plan.locate(batch)[0] if batch < self.num_batches else self.plan.num_windows

    def _pinned(self) -> bool:
        if self._pin_memory is not None or self.trainer is None:
            return bool(self._pin_memory)
        return self.trainer.strategy.root_device.type == "cuda"

    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks. 0 and 1 without a trainer."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
