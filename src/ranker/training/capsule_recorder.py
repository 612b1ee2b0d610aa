"""The newest batches of a run and their signals, for capsules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ranker.capsules import capsule as files
from ranker.data.batch import Batch

_AHEAD = 16  # batches that a trainer may have fetched but not trained on


@dataclass(frozen=True)
class Entry:
    """One batch that was trained on.

    Attributes:
        step: the optimizer step it belongs to.
        batch: this rank's rows, in host memory.
        signals: gives them in the order of ``ranker.stability.pack``, on the device of the run.
        size: bytes of the batch.
    """

    step: int
    batch: Batch
    signals: Callable[[], Tensor]
    size: int


class Recorder:
    """Keeps the newest batches, and batches of some ranges of steps longer.

    Nothing is copied: a reference keeps a batch where the loader put it. Over the bound the oldest batches are dropped
    first, those of the held ranges last.

    Args:
        max_bytes: bound on the size of all batches together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[Entry] = []
        self._bytes = 0
        self._held: list[tuple[int, int]] = []
        self._forgotten = -1  # up to this step only held batches are left

    def add(self, step: int, batch: Batch, signals: Callable[[], Tensor]) -> None:
        """Adds the batch just trained on."""
        batch = replace(batch, opening=None)  # it would keep the whole window alive
        self._entries.append(Entry(step, batch, signals, files.num_bytes(batch)))
        self._bytes += self._entries[-1].size
        while self._bytes > self._max_bytes and self._entries:
            oldest = next((i for i, entry in enumerate(self._entries) if not self._is_held(entry)), 0)
            self._bytes -= self._entries.pop(oldest).size

    def hold(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Holds the batches of steps after + 1 .. until of each range (after, until), and no others."""
        self._held, self._forgotten = list(ranges), -1

    def forget(self, until: int) -> None:
        """Drops batches up to a step, but for the held ones."""
        if until > self._forgotten:
            self._forgotten = until
            self._entries = [entry for entry in self._entries if entry.step > until or self._is_held(entry)]
            self._bytes = sum(entry.size for entry in self._entries)

    def clear(self) -> None:
        """Drops everything, and holds nothing."""
        self._entries, self._bytes, self._held, self._forgotten = [], 0, [], -1

    def covers_after(self, until: int) -> int:
        """The smallest step s such that all batches of steps s + 1 .. until are kept; ``until`` if none is."""
        first = until
        for entry in reversed(self._entries):
            if entry.step <= until:
                if entry.step < first:
                    break
                first = entry.step - 1
        return first

    def between(self, after: int, until: int) -> list[Entry]:
        """Batches of steps after + 1 .. until, in order."""
        return [entry for entry in self._entries if after < entry.step <= until]

    def _is_held(self, entry: Entry) -> bool:
        return any(after < entry.step <= until for after, until in self._held)


class Overheard:
    """A loader that notes its batches as they pass, the newest ones alone."""

    def __init__(self, loader: Iterable[Batch], noted: dict[int, Batch]) -> None:
        self._loader, self._noted = loader, noted

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self._noted[batch.number] = replace(batch, opening=None)
            while len(self._noted) > _AHEAD:
                del self._noted[next(iter(self._noted))]
            yield batch
