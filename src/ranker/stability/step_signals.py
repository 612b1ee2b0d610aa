"""What the detector is fed: signals joined over the ranks, and a buffer that is read without waiting."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor


class Signals(TypedDict):
    """One step's signals, by the names that ``DivergenceDetector.update`` gives them."""

    losses_T: Tensor
    auc_T: Tensor | None
    spread_T: Tensor | None
    nonfinite: Tensor | None


def reduce_signals(
    losses_T: Tensor, auc_T: Tensor | None = None, spread_T: Tensor | None = None, nonfinite: Tensor | None = None
) -> Signals:
    """Joins one step's signals over the ranks, so that every rank comes to the same verdict at the same step.

    Losses and AUCs become their mean over ranks, the spread the root of the mean variance, ``nonfinite`` true where
    any rank's is. One all-reduce of 3 T + 1 numbers; nothing where ``torch.distributed`` is not initialised. Every rank
    must call, with the same signals present.

    Returns:
        Arguments of ``DivergenceDetector.update``, as keywords.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return {"losses_T": losses_T, "auc_T": auc_T, "spread_T": spread_T, "nonfinite": nonfinite}
    row = pack(losses_T, auc_T, spread_T.square() if spread_T is not None else None, nonfinite)
    dist.all_reduce(row)
    tasks, ranks = len(losses_T), dist.get_world_size()
    mean = row / ranks
    return {
        "losses_T": mean[:tasks],
        "auc_T": None if auc_T is None else mean[tasks : 2 * tasks],
        "spread_T": None if spread_T is None else mean[2 * tasks : 3 * tasks].sqrt(),
        "nonfinite": None if nonfinite is None else row[-1] > 0,
    }


def pack(losses_T: Tensor, auc_T: Tensor | None, spread_T: Tensor | None, nonfinite: Tensor | None) -> Tensor:
    """One row of 3 T + 1 numbers, float32, on the device of the losses; nan for what is not known."""
    losses_T = losses_T.detach().float()
    unknown_T = losses_T.new_full(losses_T.shape, torch.nan)
    flag = losses_T.new_zeros(1) if nonfinite is None else nonfinite.detach().to(losses_T).reshape(1)
    return torch.cat(
        [losses_T, *(unknown_T if x is None else x.detach().to(losses_T) for x in (auc_T, spread_T)), flag]
    )


class SignalBuffer:
    """Rows on the device, read without waiting for it.

    ``add`` keeps a reference to the row. ``take`` gathers the rows in one kernel. On CPU it returns them; on a GPU it
    starts a copy to pinned memory and returns the rows whose copy the call before had started: by then it is long
    done, so that the host waits for nothing. Which rows a call returns depends on the calls alone, never on timing, so
    ranks that make the same calls see the same rows.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[Tensor] = []
        self._flying: tuple[list[int], Tensor, torch.cuda.Event] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, row: Tensor) -> None:
        """Adds the row of a step."""
        self._steps.append(step)
        self._rows.append(row)

    def take(self, *, wait: bool = False) -> list[tuple[int, list[float]]]:
        """Rows with their steps, in order; ``wait`` for all of them."""
        taken = self._land()
        if self._rows:
            steps, rows = self._steps, torch.stack(self._rows)
            self._steps, self._rows = [], []
            if rows.is_cuda:
                host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                host.copy_(rows, non_blocking=True)
                done = torch.cuda.Event()
                done.record()
                self._flying = (steps, host, done)
            else:
                taken += zip(steps, rows.tolist(), strict=True)
        return taken + self._land() if wait else taken

    def _land(self) -> list[tuple[int, list[float]]]:
        if self._flying is None:
            return []
        steps, host, done = self._flying
        self._flying = None
        done.synchronize()
        return list(zip(steps, host.tolist(), strict=True))
