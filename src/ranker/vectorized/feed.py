"""The batches of a group: one for all replicas, or one each from the same window, which is read and decoded once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from omegaconf import DictConfig

from ranker.data.batch import Batch
from ranker.data.datamodule import RankingDataModule
from ranker.data.log import Log
from ranker.parts import build_data

_KEPT_READS = 2  # a window, and the next one where a batch of one replica ends before that of another


class SharedReads(Log):
    """A log that remembers its last reads, for replicas that read the same windows one after another.

    Args:
        log: the log.
    """

    def __init__(self, log: Log) -> None:
        self.schema = log.schema
        self._log = log
        self._reads: OrderedDict[tuple[int, int], Future[Batch]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def train_rows(self) -> int:
        """Number of training rows."""
        return self._log.train_rows

    @property
    def num_rows(self) -> int:
        """Number of all rows."""
        return self._log.num_rows

    @property
    def id_types(self) -> dict[str, str]:
        """As in the log."""
        return self._log.id_types

    @property
    def bad_rows(self) -> dict[tuple[str, int], int]:
        """As in the log."""
        return self._log.bad_rows

    def read(self, start: int, stop: int) -> Batch:
        """Rows start .. stop-1, decoded at the first call. Calls for other rows do not wait for it."""
        with self._lock:
            found, first = self._reads.get((start, stop)), False
            if found is None:
                found, first = self._reads.setdefault((start, stop), Future()), True
                while len(self._reads) > _KEPT_READS:
                    self._reads.popitem(last=False)
        if first:
            try:
                found.set_result(self._log.read(start, stop))
            except BaseException as error:
                found.set_exception(error)
        return found.result()

    def row_at_time(self, time_ms: int) -> int:
        """Position of the first row at or after a time."""
        return self._log.row_at_time(time_ms)

    def time_at_row(self, row: int) -> int:
        """Time of a row."""
        return self._log.time_at_row(row)


class Feed:
    """The training batches of K replicas, in lists of one (for all) or of K.

    Args:
        log: the log.
        cfg: the configuration that the replicas have in common.
        seeds: of the replicas, which decide the order inside each window.
        order_seed: of the order that all replicas share; None: each has its own.

    Attributes:
        data: the data modules, one for all replicas or one for each. Their positions are where the batches begin.
        waited: seconds in which the loop waited for batches.
    """

    def __init__(self, log: Log, cfg: DictConfig, seeds: Sequence[int], order_seed: int | None) -> None:
        source = SharedReads(log)
        self.data: list[RankingDataModule]
        if order_seed is None:
            # Replicas with orders of their own take turns at one window. A reading thread of each would not.
            self.data = [build_data(cfg, source, seed=seed, num_workers=0) for seed in seeds]
        elif set(seeds) == {order_seed}:
            self.data = [build_data(cfg, source, seed=order_seed)]
        else:
            self.data = [build_data(cfg, source, order_seed=order_seed)]
        self.waited = 0.0

    def of(self, replica: int) -> RankingDataModule:
        """The data module of a replica."""
        return self.data[replica if len(self.data) > 1 else 0]

    def __iter__(self) -> Iterator[list[Batch]]:
        loaders = {id(data): iter(data.train_dataloader()) for data in self.data}
        while True:
            start = time.perf_counter()
            batches = [next(loaders[id(data)], None) for data in self.data]
            self.waited += time.perf_counter() - start
            found = [batch for batch in batches if batch is not None]
            if not found:
                return
            yield found

    def keep(self, replicas: Sequence[int]) -> None:
        """Drops the batches of the other replicas."""
        if len(self.data) > 1:
            self.data = [self.data[k] for k in replicas]
