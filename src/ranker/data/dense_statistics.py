"""Normalisation of dense features with mean and standard deviation of past windows, so that no later row is used."""

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
    """Number of rows, and their mean and squared deviations per dense feature, in float64.

        x' = (x - mean) / std        std = sqrt(squares / rows), 1 where it is 0

    x is the value after the schema's scale and transform. A null counts as its ``fill_null``. Rows without any observed
    label are left out, as in training. Without rows, x' = x.

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
        """Statistics of some rows, computed in two passes. Bit-equal however the rows were read."""
        counted_B = rows.mask_BT.numpy().any(axis=1)
        x_BF = np.ascontiguousarray(rows.dense_BF.numpy()[counted_B], dtype=np.float64)
        if len(x_BF) == 0:
            return NOTHING
        mean_F = x_BF.mean(axis=0)
        return cls(len(x_BF), mean_F, np.square(x_BF - mean_F).sum(axis=0))

    def joined(self, later: DenseStatistics) -> DenseStatistics:
        """Statistics of both sets of rows together, computed without the rows.

            n = n_a + n_b        d = mean_b - mean_a
            mean = mean_a + d * n_b / n        squares = squares_a + squares_b + d^2 * n_a * n_b / n

        Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
        (1979), the formula for joining two samples, with means instead of sums.
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
        """The rows with x' in place of x, on the CPU. The argument is not changed."""
        if self.rows == 0:
            return rows
        std_F = np.sqrt(self.squares_F / self.rows)
        x_BF = (rows.dense_BF.numpy() - self.mean_F) / np.where(std_F > 0, std_F, 1.0)
        return replace(rows, dense_BF=torch.from_numpy(x_BF.astype(np.float32)))

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: a number and two tensors, whatever the number of past rows."""
        tensors = {"mean": torch.from_numpy(self.mean_F), "squares": torch.from_numpy(self.squares_F)}
        return {"rows": self.rows, **tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DenseStatistics:
        """Statistics from a checkpoint."""
        return cls(int(state["rows"]), state["mean"].numpy().copy(), state["squares"].numpy().copy())


NOTHING = DenseStatistics(0, np.zeros(0), np.zeros(0))


class PastWindows:
    """For each window, the statistics of the windows that were trained on before it.

    The statistics before window k cover rows of windows 0 .. k - 1 only (fewer if some were skipped), never its own.
    The first window has nothing before it and is normalised by its own statistics. Raw values there would make the
    inputs jump at the second window, which can cost the model.
    Every rank reads whole windows, so all ranks compute the same numbers without communication.

    Attributes:
        carried: whether the first window has statistics of an earlier run before it.
    """

    def __init__(self) -> None:
        self._before = {0: NOTHING}
        self.carried = False

    def before(self, window: int) -> DenseStatistics:
        """The statistics before a window.

        Raises:
            UserError: the run was resumed from a checkpoint of a later window.
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
        """Stores the statistics before and after a window."""
        self._before[window], self._before[window + 1] = before, after

    def keep_until(self, window: int) -> None:
        """Removes the statistics before later windows, which were prefetched but will not be trained on."""
        self._before = {k: known for k, known in self._before.items() if k <= window}

    def begin(self, window: int, before: DenseStatistics, *, carried: bool) -> None:
        """Starts from a checkpoint, or from the statistics of an earlier run before window 0."""
        self._before, self.carried = {window: before}, carried
