"""Distributed data-parallel training that ends when a rank is lost, instead of waiting for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, ParallelStrategy

from ranker.errors import UserError
from ranker.training.lightning_private import without_observer
from ranker.training.rank_watch import RankWatch

PARENT_VARIABLE = "EVENKEEL_PARENT"  # process id of rank 0, for the ranks that it starts
LATER = 10.0  # seconds that a collective call waits beyond the timeout: the watch can name the rank, torch cannot
TO_START = 300.0  # seconds that ranks have to start and meet, whatever the timeout: imports are slow on a busy machine


class LostRankError(UserError):
    """A rank has ended or stopped, and the run with it.

    Attributes:
        spoken: another rank says the line.
    """

    spoken = False


class Watched(ParallelStrategy):
    """What the strategies of this project add to Lightning's: a watch over the ranks.

    Args:
        timeout_seconds: silence after which a rank is given up, and about the longest wait in a collective call.
        options: of Lightning's strategy.

    Attributes:
        advice: says how to go on with the run; the end of the line about a lost rank.

    Raises:
        UserError: the timeout is not above 0.
    """

    def __init__(self, *, timeout_seconds: float = 600.0, **options: Any) -> None:
        if not timeout_seconds > 0:
            raise UserError(f"trainer.strategy.timeout_seconds must be above 0, got {timeout_seconds}")
        super().__init__(timeout=timedelta(seconds=max(timeout_seconds + LATER, TO_START)), **options)  # type: ignore[call-arg]
        self.advice: Callable[[], str] = str
        self._timeout_seconds = timeout_seconds
        self._watch: RankWatch | None = None
        self._started = os.environ.get(PARENT_VARIABLE)  # by rank 0

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        without_observer(self)

    def _start_watch(self) -> None:
        """Looks after the processes of this machine, while the ranks meet."""
        self._watch = RankWatch(
            self.global_rank,
            timeout=self._timeout_seconds,
            children=getattr(self.launcher, "procs", ()),
            parent=int(self._started) if self._started and self.local_rank else None,
            advice=self.advice,
        )
        self._watch.start()

    def _join_watch(self) -> None:
        """Connects the watches of all ranks, which have met."""
        assert self._watch is not None
        assert self.cluster_environment is not None
        port, token = self.broadcast((self._watch.port, self._watch.token))
        self._watch.connect((self.cluster_environment.main_address, port), token=token)

    def teardown(self) -> None:
        """Ends the watch: what follows until the next evaluation is no collective work.

        After an error it goes on, until ``explained`` has found out whose error it is.
        """
        if self._watch is not None:
            if isinstance(sys.exception(), Exception):
                self._watch.alive()
            else:
                self._watch.end()
        super().teardown()

    def explained(self, error: BaseException) -> BaseException:
        """A line that names the lost rank, where that is why an error was raised; else the error itself.

        Does not return in a rank that rank 0 will end.
        """
        watch = self._watch
        if watch is None:
            return error
        if not _of_connection(error):
            watch.end(f"failed {error}" if isinstance(error, Exception) else "bye")
            return error
        watch.alive()
        lost = watch.wait()
        if lost is None:
            lost = f"the ranks lost each other ({' '.join(str(error).split())[:160]})"
            watch.end(f"failed {lost}")
        watch.end()
        told = LostRankError(f"{lost}; go on with: {self.advice()}")
        told.spoken = not watch.speaks
        return told

    def end_others(self) -> None:
        """Kills the ranks that this one has started. They would wait for it in a collective call."""
        if self._watch is not None:
            self._watch.end_children()


class WatchedDDP(Watched, DDPStrategy):
    """Lightning's DDP strategy with a watch over the ranks. Arguments as of ``Watched``."""

    def setup_distributed(self) -> None:
        """Joins the process group and starts the watch."""
        self.set_world_ranks()
        self._start_watch()
        super().setup_distributed()
        self._join_watch()


def watched(trainer: pl.Trainer) -> Watched | None:
    """The strategy of a trainer, if it watches its ranks."""
    return trainer.strategy if isinstance(trainer.strategy, Watched) else None


def _of_connection(error: BaseException) -> bool:
    """Whether a collective call failed. gloo raises a plain RuntimeError, with its own file in the message."""
    known = isinstance(error, torch.distributed.DistError)
    return known or (isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)))
