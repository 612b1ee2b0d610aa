"""The recent past in host memory: references to batches and signals, bounded in bytes, with a stretch held on to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ranker.capsules.capsule import num_bytes
from ranker.data.batch import Batch


@dataclass(frozen=True)
class Entry:
    """One batch that was trained on.

    Attributes:
        step: the optimizer step it belongs to.
        batch: this rank's rows, in host memory.
        signals: as ``ranker.stability.pack`` gives them, wherever they are.
        size: bytes of the batch.
    """

    step: int
    batch: Batch
    signals: Tensor
    size: int


class Recorder:
    """Keeps what came last, and longer what was asked for.

    Nothing is copied: a batch that is referred to stays where the loader put it. Over the bound the oldest batches go
    first, those held on to last.

    Args:
        max_bytes: of all batches kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[Entry] = []
        self._bytes = 0
        self._held = (0, -1)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of the batches kept."""
        return self._bytes

    def add(self, step: int, batch: Batch, signals: Tensor) -> None:
        """Adds the batch just trained on."""
        batch = replace(batch, opening=None)  # it would keep the whole window alive
        self._entries.append(Entry(step, batch, signals, num_bytes(batch)))
        self._bytes += self._entries[-1].size
        while self._bytes > self._max_bytes and self._entries:
            oldest = next((i for i, entry in enumerate(self._entries) if not self._is_held(entry)), 0)
            self._bytes -= self._entries.pop(oldest).size

    def hold(self, after: int, until: int) -> None:
        """Holds on to steps after + 1 .. until, and to no others."""
        self._held = (after + 1, until)

    def forget(self, until: int) -> None:
        """Drops what is not held up to a step."""
        if self._entries and self._entries[0].step <= until:
            self._keep(lambda entry: entry.step > until or self._is_held(entry))

    def clear(self) -> None:
        """Drops everything, and holds on to nothing."""
        self._entries, self._bytes, self._held = [], 0, (0, -1)

    def covers_after(self, until: int) -> int:
        """The smallest step s such that all batches of steps s + 1 .. until are there; until where none is."""
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
        return self._held[0] <= entry.step <= self._held[1]

    def _keep(self, wanted: Callable[[Entry], bool]) -> None:
        self._entries = [entry for entry in self._entries if wanted(entry)]
        self._bytes = sum(entry.size for entry in self._entries)
