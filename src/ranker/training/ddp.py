"""Distributed data-parallel training that ends when a rank is lost, instead of waiting for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from ranker.errors import UserError
from ranker.training.lightning_private import without_observer
from ranker.training.rank_watch import RankWatch

PARENT_VARIABLE = "EVENKEEL_PARENT"  # process id of rank 0, for the ranks that it starts
LATER = 10.0  # seconds that a collective call waits beyond the timeout: the watch can name the rank, torch cannot
TO_START = 300.0  # seconds that ranks have to start and meet, whatever the timeout: imports are slow on a busy machine


class LostRankError(UserError):
    """A rank has ended or stopped, and the run with it."""


class WatchedDDP(DDPStrategy):
    """Lightning's DDP strategy with a watch over the ranks.

    Args:
        timeout_seconds: silence after which a rank is given up, and about the longest wait in a collective call.
        options: of Lightning's DDPStrategy.

    Attributes:
        advice: says how to go on with the run; the end of the line about a lost rank.

    Raises:
        UserError: the timeout is not above 0.
    """

    def __init__(self, *, timeout_seconds: float = 600.0, **options: Any) -> None:
        if not timeout_seconds > 0:
            raise UserError(f"trainer.strategy.timeout_seconds must be above 0, got {timeout_seconds}")
        super().__init__(timeout=timedelta(seconds=max(timeout_seconds + LATER, TO_START)), **options)
        self.advice: Callable[[], str] = str
        self._timeout_seconds = timeout_seconds
        self._watch: RankWatch | None = None
        self._started = os.environ.get(PARENT_VARIABLE)  # by rank 0

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        without_observer(self)

    def setup_distributed(self) -> None:
        """Joins the process group and starts the watch."""
        self.set_world_ranks()
        self._watch = watch = RankWatch(
            self.global_rank,
            timeout=self._timeout_seconds,
            children=getattr(self.launcher, "procs", ()),
            parent=int(self._started) if self._started and self.local_rank else None,
            advice=self.advice,
        )
        watch.start()
        super().setup_distributed()
        assert self.cluster_environment is not None
        watch.connect((self.cluster_environment.main_address, self.broadcast(watch.port)))

    def teardown(self) -> None:
        """Ends the watch: what follows until the next evaluation is no collective work."""
        if self._watch is not None:
            self._watch.end()
        super().teardown()

    def explained(self, error: BaseException) -> BaseException:
        """A line that names the lost rank, where that is why an error was raised; else the error itself.

        Does not return in a rank that rank 0 will end.
        """
        if self._watch is None or not _of_connection(error):
            return error
        lost = self._watch.wait()
        if lost is None:
            lost = f"the ranks lost each other ({' '.join(str(error).split())[:160]})"
        return LostRankError(f"{lost}; go on with: {self.advice()}")

    def end_others(self) -> None:
        """Kills the ranks that this one has started. They would wait for it in a collective call."""
        if self._watch is not None:
            self._watch.end_children()


def watched(trainer: pl.Trainer) -> WatchedDDP | None:
    """The strategy of a trainer, if it watches its ranks."""
    return trainer.strategy if isinstance(trainer.strategy, WatchedDDP) else None


def _of_connection(error: BaseException) -> bool:
    """Whether a collective call failed. gloo raises a plain RuntimeError, with its own file in the message."""
    known = isinstance(error, torch.distributed.DistError)
    return known or (isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)))
