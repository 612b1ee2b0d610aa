"""The state of a training run as plain tensors and numbers: what the next step reads, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ranker.atomic import replacing
from ranker.errors import UserError
from ranker.metrics import StreamingAUC
from ranker.stability import DivergenceDetector

FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The state after a step, on the CPU. Nobody writes into it, so it can be restored any number of times.

    The fields up to ``rng`` decide the next step on given batches; a capsule and a replay need no more. A running fit
    also needs the others, to draw the same batches and random numbers.

    Attributes:
        step: optimizer steps taken.
        net: the weights.
        optimizer: the optimizer's state.
        schedule: state of the learning rate schedule; None where there is none.
        auc: histograms of the training AUC: of one rank in a run, summed over all ranks in a replay.
        detector: the divergence detector's state, without unreported events; None if there is no detector.
        rng: state of torch's generator on the CPU; None leaves the generator as it is.
        data: state of the data module: position and dense statistics.
        process: state of the other random generators and of the precision plugin.
        healthy: whether the detector objected to nothing up to and including this step.
        mark: where the rows of large tables are found, which are in none of the fields then; it means something in the
            process of the run alone. None: all rows are here.
    """

    step: int
    net: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any] | None
    auc: Tensor
    detector: dict[str, Any] | None
    rng: Tensor | None = None
    data: dict[str, Any] = field(default_factory=dict)
    process: dict[str, Any] = field(default_factory=dict)
    healthy: bool = True
    mark: Any = None

    @property
    def position(self) -> int:
        """Number of the next batch, over all ranks."""
        return int(self.data["position"])

    def save(self, path: Path) -> None:
        """Writes a file that ``torch.load(weights_only=True)`` reads, atomically."""
        with replacing(path) as temporary:
            torch.save({"format": FORMAT, **vars(self), "mark": None}, temporary)

    @classmethod
    def load(cls, path: Path) -> TrainingState:
        """Reads a file of ``save`` without running any code from it.

        Raises:
            UserError: it is not such a file, or one of another version.
        """
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever a damaged file makes torch raise
            raise UserError(f"snapshot {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise UserError(f"{path} is no snapshot of this version (format {FORMAT})")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The live objects that a step changes."""

    net: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR | None
    train_auc: StreamingAUC
    detector: DivergenceDetector | None

    def capture(self, step: int, **more: Any) -> TrainingState:
        """Copies their state.

        Args:
            step: optimizer steps taken.
            more: further fields of ``TrainingState``, and what is to be copied in the place of ``net`` and others.
        """
        # state_dict() of the detector reads all signals so far. Its unreported events belong to the run as it went.
        detector = None if self.detector is None else self.detector.state_dict() | {"unreported": []}
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "auc": self.train_auc.get_extra_state(),
            "detector": detector,
            "rng": torch.get_rng_state(),
            **more,
        }
        return TrainingState(step=step, **copied(state))

    def restore(self, state: TrainingState, *, rows: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """Puts a state back, bit by bit.

        Args:
            state: the state.
            rows: what the optimizer keeps for the rows of large tables, by number of the parameter, which are not in
                the state; the net has its rows back by now. None: all is in the state.
        """
        self.net.load_state_dict(state.net, strict=rows is None)
        optimizer = copied(state.optimizer)  # torch keeps the tensors it is given
        for index, tensors in (rows or {}).items():
            optimizer["state"].setdefault(index, {}).update(tensors)
        self.optimizer.load_state_dict(optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None and state.schedule is not None:
            self.schedule.load_state_dict(copied(state.schedule))
        self.restore_history(state)

    def restore_history(self, state: TrainingState) -> None:
        """Puts back all but weights and optimizer: training AUC, detector and random numbers."""
        self.train_auc.set_extra_state(state.auc.to(self.train_auc.get_extra_state().device))
        if self.detector is not None and state.detector is not None:
            self.detector.load_state_dict(copied(state.detector))
        if state.rng is not None:
            torch.set_rng_state(state.rng)


def copied(value: Any) -> Any:
    """A copy with its own tensors, on the CPU, and plain dicts around them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(copied, value))
    return value
