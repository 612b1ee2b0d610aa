"""The result of a bisection, as numbers for bisect.json and as sentences for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ranker.runs.run_folder import plain
from ranker.stability import Event


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features without which there is no divergence.

    Attributes:
        names: a small set of features; empty where neither half of all features at the usual value prevents it.
        distance: by dense feature, the largest deviation in the batch over the largest one in the batches before.
    """

    names: list[str]
    distance: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows without which there is no divergence.

    Attributes:
        row_ids: their ``Batch.row_B``. If one dense feature is the cause and it is an outlier in more rows than needed,
            all of these rows.
        alone: rows that cause a divergence by themselves, among those that were tried one by one.
        of: number of rows in the batch.
    """

    row_ids: list[int]
    alone: list[int]
    of: int


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks through whose gradient the model was harmed.

    Attributes:
        needed: tasks without whose gradient there is no divergence.
        alone: if none is needed, tasks whose gradient is sufficient by itself.
        share: by task, the norm of its gradient below the heads over the sum of these norms.
    """

    needed: list[str]
    alone: list[str]
    share: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Layers through whose update the model was harmed.

    Attributes:
        needed: layers without whose update there is no divergence.
        alone: if none is needed, layers whose update is sufficient by itself.
        step: by layer, the largest change of a weight over the root mean square of the layer's weights.
    """

    needed: list[str]
    alone: list[str]
    step: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a bisection.

    Attributes:
        event: the divergence, as the detector found it in the replay.
        replays: number of replays.
        step: step of the batch without which there is no divergence; None where no single batch is the cause.
        number: index of that batch in the training order.
        last_batches: number of batches up to the onset that must be left out together; None where that does not help.
        harm: whether the model diverges after the batch; false if only the batch's own losses were high.
        features: which features.
        rows: which rows; None where no small set of rows is the cause.
        tasks: through which tasks; None where the model was not harmed.
        layers: through which layers; None likewise.
    """

    event: Event
    replays: int
    step: int | None
    number: int | None
    last_batches: int | None
    harm: bool
    features: Features
    rows: Rows | None
    tasks: Tasks | None
    layers: Layers | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; numbers that are not finite become None."""
        return plain(asdict(self)) | {"verdict": self.sentences()}

    def sentences(self) -> list[str]:
        """The result in words."""
        sentences = [self._event(), self._batch(), self._features()]
        if self.step is not None:
            sentences.append(self._rows())
        if not self.harm:
            sentences.append("Model: not harmed; only the losses of this batch are high.")
        if self.tasks is not None:
            sentences.append(_tasks(self.tasks))
        if self.layers is not None:
            sentences.append(_layers(self.layers))
        return sentences

    def _event(self) -> str:
        who = f", {self.event.task} first" if self.event.task else ""
        how = f" to {self.event.depth:.3g}x" if math.isfinite(self.event.depth) and self.event.depth > 1 else ""
        return f"Step {self.event.step}: the losses move{how}{who}."

    def _batch(self) -> str:
        if self.step is not None:
            return f"Batch: that of step {self.step} (number {self.number} of the run); without it nothing moves."
        if self.last_batches is not None:
            return f"Batch: no single one; without the last {self.last_batches} nothing moves."
        return (
            "Batch: none; the losses move whichever batch is left out. Check the learning rate and the optimizer "
            "rather than the data."
        )

    def _features(self) -> str:
        names = self.features.names
        if not names:
            return "Feature: none in particular; with either half of them at the usual value the losses still move."
        if len(names) > 8:
            return f"Feature: no small set; {len(names)} together have to be at their usual value."
        deviation = self.features.distance.get(names[0], 0.0)
        outlier = f", {deviation:,.0f}x its largest deviation before" if len(names) == 1 and deviation >= 2 else ""
        return f"Feature: {', '.join(names)}{outlier}; at the usual value nothing moves."

    def _rows(self) -> str:
        if self.rows is None:
            return "Rows: no small set; leaving out half of the batch does not help."
        ids, alone = self.rows.row_ids, [row for row in self.rows.row_ids if row in self.rows.alone]
        how = "together" if not alone else "each alone" if len(alone) == len(ids) else f"{_listed(alone)} alone"
        return f"Rows: {_listed(ids)} ({len(ids)} of {self.rows.of}, {how}); without them nothing moves."


def _tasks(tasks: Tasks) -> str:
    largest = max(tasks.share, key=lambda name: tasks.share[name])
    norm = f"{largest} has {tasks.share[largest]:.0%} of the gradient below the heads"
    return f"Task: {_through(tasks.needed, tasks.alone, len(tasks.share), 'gradient')}; {norm}."


def _layers(layers: Layers) -> str:
    largest = max(layers.step, key=lambda name: layers.step[name])
    step = f"{largest} moves farthest, by {layers.step[largest]:.3g}x the size of its weights"
    return f"Layer: {_through(layers.needed, layers.alone, len(layers.step), 'update')}; {step}."


def _through(needed: Sequence[str], alone: Sequence[str], of: int, what: str) -> str:
    if needed:
        return f"without the {what} of {', or of '.join(needed)}, nothing moves"
    if len(alone) == of:
        return f"all alike; the {what} of any one of them is enough"
    if alone:
        return f"none is needed; the {what} of {' or of '.join(alone)} alone is enough"
    return "several are needed together"


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:12])) + (", ..." if len(ids) > 12 else "")
