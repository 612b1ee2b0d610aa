"""Mean and spread of dense features over past windows alone, so that normalising looks at nothing that lies ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ranker.data.batch import Batch
from ranker.errors import UserError

Mode = Literal["none", "past_windows"]
MODES: tuple[Mode, ...] = ("none", "past_windows")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DenseStatistics:
    """How many rows, their mean and their spread, by dense feature, in float64.

        x' = (x - mean) / std        std = sqrt(squares / rows), 1 where it is 0

    x is the value after the schema's scale and transform. A null counts as the value it is read as (``fill_null``).
    Rows without any observed label are left out, as they are in training. Before there are rows, x' = x.

    Attributes:
        rows: n, number of rows.
        mean_F: float64 [F].
        squares_F: float64 [F], sum over rows of (x - mean)^2.
    """

    rows: int
    mean_F: Floats
    squares_F: Floats

    @classmethod
    def of(cls, rows: Batch) -> DenseStatistics:
        """Those of some rows, in two passes; the same bits however the rows were read."""
        counted_B = rows.mask_BT.numpy().any(axis=1)
        x_BF = np.ascontiguousarray(rows.dense_BF.numpy()[counted_B], dtype=np.float64)
        if len(x_BF) == 0:
            return NOTHING
        mean_F = x_BF.mean(axis=0)
        return cls(len(x_BF), mean_F, np.square(x_BF - mean_F).sum(axis=0))

    def joined(self, later: DenseStatistics) -> DenseStatistics:
        """Those of both, without the rows at hand.

            n = n_a + n_b        d = mean_b - mean_a
            mean = mean_a + d * n_b / n        squares = squares_a + squares_b + d^2 * n_a * n_b / n

        Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
        (1979), the formula that joins two samples, with means in place of sums.
        """
        if self.rows == 0 or later.rows == 0:
            return later if self.rows == 0 else self
        rows = self.rows + later.rows
        apart_F = later.mean_F - self.mean_F
        return DenseStatistics(
            rows,
            self.mean_F + apart_F * (later.rows / rows),
            self.squares_F + later.squares_F + np.square(apart_F) * (self.rows * later.rows / rows),
        )

    def normalise(self, rows: Batch) -> Batch:
        """The rows with x' for x, on the CPU; what was given stays as it is."""
        if self.rows == 0:
            return rows
        std_F = np.sqrt(self.squares_F / self.rows)
        x_BF = (rows.dense_BF.numpy() - self.mean_F) / np.where(std_F > 0, std_F, 1.0)
        return replace(rows, dense_BF=torch.from_numpy(x_BF.astype(np.float32)))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: a number and two tensors, however long the past is."""
        tensors = {"mean": torch.from_numpy(self.mean_F), "squares": torch.from_numpy(self.squares_F)}
        return {"rows": self.rows, **tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DenseStatistics:
        """Those of a checkpoint."""
        return cls(int(state["rows"]), state["mean"].numpy().copy(), state["squares"].numpy().copy())


NOTHING = DenseStatistics(0, np.zeros(0), np.zeros(0))


class PastWindows:
    """What was known before each window: the statistics of the windows that were trained on before it.

    The statistics before window k hold rows of windows 0 .. k - 1 alone (fewer where some were skipped), never its own.
    Every rank reads whole windows, so all come to the same numbers without asking each other.
    """

    def __init__(self) -> None:
        self._before = {0: NOTHING}

    def before(self, window: int) -> DenseStatistics:
        """What was known before a window.

        Raises:
            UserError: the run went on from a checkpoint of a later window.
        """
        known = [k for k in self._before if k <= window]
        if not known:
            first = min(self._before)
            raise UserError(
                f"cannot go back to window {window}: the dense statistics of the checkpoint begin at window {first}; "
                "resume from an earlier checkpoint, or use data.dense_statistics=none"
            )
        return self._before[max(known)]

    def note(self, window: int, before: DenseStatistics, after: DenseStatistics) -> None:
        """Keeps what was known before a window, and what is known after it."""
        self._before[window], self._before[window + 1] = before, after

    def keep_until(self, window: int) -> None:
        """Forgets what was known before later windows: they were fetched, but are not going to be trained on."""
        self._before = {k: known for k, known in self._before.items() if k <= window}

    def begin(self, window: int, before: DenseStatistics) -> None:
        """Starts from a checkpoint."""
        self._before = {window: before}
