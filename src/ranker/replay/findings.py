"""What a bisection found, in numbers and in plain words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ranker.stability import Event


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features without which nothing moves.

    Attributes:
        names: a smallest set found; empty where no half of the features at the usual value keeps the model calm.
        distance: by dense feature, the farthest value in the batch over the farthest in the calm batches before.
    """

    names: list[str]
    distance: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows without which nothing moves.

    Attributes:
        row_ids: ``Batch.row_B`` of them. Where one dense feature does it and lies out of its range in more rows than it
            takes, all of these.
        alone: those that move the losses alone, as far as rows were tried one by one.
        of: rows of the batch.
    """

    row_ids: list[int]
    alone: list[int]
    of: int


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Through which tasks the model was moved.

    Attributes:
        needed: tasks without whose gradient nothing moves.
        alone: where none is needed, tasks whose gradient alone is enough.
        share: by task, the norm of its gradient below the heads over the sum of them all.
    """

    needed: list[str]
    alone: list[str]
    share: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """In which layers it happened.

    Attributes:
        needed: layers without whose update nothing moves.
        alone: where none is needed, layers whose update alone is enough.
        step: by layer, the largest move of a weight over the root mean square of the layer's weights.
    """

    needed: list[str]
    alone: list[str]
    step: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The answer.

    Attributes:
        event: what moved, as the detector saw it in the replay.
        replays: how many it took.
        step: the step whose batch it takes; None where no single batch does it.
        number: that batch's place in the training order.
        last_batches: batches up to the onset that have to be left out together; None where not even that helps.
        harm: whether the model moves after the batch, or only the batch's own losses were high.
        features: which features.
        rows: which rows; None where no few rows do it.
        tasks: through which tasks; None where the model was not harmed.
        layers: in which layers; None likewise.
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
        """Plain data, fit for JSON: numbers that are not finite become None."""
        return _finite(asdict(self)) | {"verdict": self.sentences()}

    def sentences(self) -> list[str]:
        """The verdict in plain words."""
        said = [self._what(), self._batch(), self._features()]
        if self.step is not None:
            said.append(self._rows())
        if not self.harm:
            said.append("The model itself is none the worse: only the losses of this batch are high.")
        if self.tasks is not None:
            said.append(self._tasks(self.tasks))
        if self.layers is not None:
            said.append(self._layers(self.layers))
        return said

    def _what(self) -> str:
        who = f", {self.event.task} first" if self.event.task else ""
        how = f" to {self.event.depth:.3g}x" if math.isfinite(self.event.depth) and self.event.depth > 1 else ""
        return f"Step {self.event.step}: the losses move{how}{who}."

    def _batch(self) -> str:
        if self.step is not None:
            return (
                f"Batch: it takes that of step {self.step} (number {self.number} of the run); without it nothing moves."
            )
        if self.last_batches is not None:
            return f"Batch: no single one; without the last {self.last_batches} nothing moves."
        return (
            "Batch: none; whatever is left out, the model moves all the same. Look at the learning rate and the "
            "optimizer rather than at the data."
        )

    def _features(self) -> str:
        names = self.features.names
        if not names:
            return (
                "Feature: none in particular; with either half of them at the usual value the losses move all the same."
            )
        if len(names) > 8:
            return f"Feature: no few of them; {len(names)} together have to be at their usual value."
        far = self.features.distance.get(names[0], 0.0)
        beyond = f", {far:,.0f}x as far out as ever before" if len(names) == 1 and far >= 2 else ""
        return f"Feature: {', '.join(names)}{beyond}; at the usual value nothing moves."

    def _rows(self) -> str:
        if self.rows is None:
            return "Rows: no few of them; half of the batch left out does not help."
        ids, alone = self.rows.row_ids, [row for row in self.rows.row_ids if row in self.rows.alone]
        how = "together" if not alone else "each alone" if len(alone) == len(ids) else f"{_listed(alone)} alone"
        return f"Rows: {_listed(ids)} ({len(ids)} of {self.rows.of}, {how}); without them nothing moves."

    def _tasks(self, tasks: Tasks) -> str:
        most = max(tasks.share, key=lambda name: tasks.share[name])
        norm = f"{most} has {tasks.share[most]:.0%} of the gradient below the heads"
        return f"Task: {_through(tasks.needed, tasks.alone, len(tasks.share), 'gradient')}; {norm}."

    def _layers(self, layers: Layers) -> str:
        most = max(layers.step, key=lambda name: layers.step[name])
        moved = f"{most} moves farthest, by {layers.step[most]:.3g}x the size of its weights"
        return f"Layer: {_through(layers.needed, layers.alone, len(layers.step), 'update')}; {moved}."


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:12])) + (", ..." if len(ids) > 12 else "")


def _through(needed: list[str], alone: list[str], of: int, what: str) -> str:
    if needed:
        return f"without the {what} of {', or of '.join(needed)}, nothing moves"
    if len(alone) == of:
        return f"all alike; the {what} of any one of them is enough alone"
    if alone:
        return f"none is needed; the {what} of {', '.join(alone)} is enough alone"
    return "it takes several together"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
