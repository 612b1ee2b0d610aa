"""Trains the batches of a capsule again: one process, a plain loop, the same arithmetic as the run's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ranker.capsules.training_state import State
from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.losses import MultitaskLoss
from ranker.metrics import StreamingAUC
from ranker.replay.trajectory import Trajectory
from ranker.stability import DivergenceDetector, Event, pack


class Trainable(Protocol):
    """What is replayed: the parts of ``ranker.training.module.RankingModule`` that a step needs."""

    net: nn.Module
    schema: Schema
    loss: MultitaskLoss
    train_auc: StreamingAUC

    def configure_optimizers(self) -> Any:
        """An optimizer, or as Lightning has it with its schedule."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the run took its steps.

    Attributes:
        accumulate: batches a step.
        clip: bound on the gradient; None for none.
        clip_by_value: bound each coordinate and not the norm.
        autocast: lower precision of the forward pass; None for float32 throughout.
        detector: settings of the divergence detector.
    """

    accumulate: int = 1
    clip: float | None = None
    clip_by_value: bool = False
    autocast: torch.dtype | None = None
    detector: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a replay does otherwise at some batches.

    Attributes:
        at: places of those batches.
        leave_out: do not train on them, nor look at their losses.
        unseen: train on them, but do not show their losses to the detector: what matters is the model they leave.
        edit: changes the rows of each rank's share.
        weights: by place of a task, a factor on its loss.
        frozen: names of parameters that get no update.
    """

    at: frozenset[int]
    leave_out: bool = False
    unseen: bool = False
    edit: Callable[[Batch], Batch] | None = None
    weights: Mapping[int, float] | None = None
    frozen: frozenset[str] = frozenset()


class Engine:
    """A model, its optimizer and the detector, stepped by hand.

    Several ranks are replayed one after the other. Each gradient is divided by their number and added up in the order
    of the ranks, as DDP does it: for two ranks the sum is the same to the last bit, for more up to rounding, since
    their reduction may add in another order.

    Args:
        module: what is trained.
        settings: how.
        device: where.
    """

    def __init__(self, module: Trainable, settings: Settings, *, device: torch.device | str = "cpu") -> None:
        self.module = module
        self.settings = settings
        self.device = torch.device(device)
        self.step = 0
        for part in (module.net, module.loss, module.train_auc):
            part.to(self.device)
        made = module.configure_optimizers()
        self.optimizer: torch.optim.Optimizer = made["optimizer"] if isinstance(made, Mapping) else made
        self.schedule: LambdaLR | None = made["lr_scheduler"]["scheduler"] if isinstance(made, Mapping) else None
        self.detector = self._new_detector()
        self._names = {id(p): name for name, p in module.net.named_parameters()}

    def state(self) -> State:
        """A copy of where it stands."""
        return State(
            step=self.step,
            net={k: v.clone() if isinstance(v, Tensor) else v for k, v in self.module.net.state_dict().items()},
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            schedule=copy.deepcopy(self.schedule.state_dict()) if self.schedule else None,
            auc=self.module.train_auc.get_extra_state().clone(),
            detector=copy.deepcopy(self.detector.state_dict()),
            rng=torch.get_rng_state(),
        )

    def restore(self, state: State) -> None:
        """Goes back (or on) to a state, which stays as it is."""
        self.step = state.step
        self.module.net.load_state_dict(state.net)
        self.optimizer.load_state_dict(copy.deepcopy(state.optimizer))  # torch keeps the tensors it is given
        if self.schedule is not None and state.schedule is not None:
            self.schedule.load_state_dict(copy.deepcopy(state.schedule))
        self.restore_past(state)

    def restore_past(self, state: State) -> None:
        """Takes over what the detector and the AUC know, and the random numbers to come."""
        self.step = state.step
        self.module.train_auc.set_extra_state(state.auc.to(self.device))
        self.detector = self._new_detector()
        if state.detector is not None:
            self.detector.load_state_dict(copy.deepcopy(state.detector))
        if state.rng is not None:
            torch.set_rng_state(state.rng)

    def run(
        self,
        steps: Sequence[int],
        batches: Sequence[Sequence[Batch]],
        *,
        name: str = "",
        first: int = 0,
        changes: Iterable[Change] = (),
        until_moved: bool = False,
        tick: Callable[[], None] = lambda: None,
    ) -> Trajectory:
        """Trains on batches in order.

        Args:
            steps: of each batch, the step it belongs to; the last batch of a step completes it.
            batches: by batch, the shares of the ranks.
            name: of the trajectory.
            first: place of the first batch, for ``changes``.
            changes: what to do otherwise.
            until_moved: stop at the first divergence.
            tick: called after each batch.
        """
        changes = list(changes)
        rows: list[Tensor] = []
        seen: list[int] = []
        events: list[Event] = []
        start = self.step
        self.module.net.train()
        self.optimizer.zero_grad()
        for number, (step, parts) in enumerate(zip(steps, batches, strict=True)):
            here = [change for change in changes if first + number in change.at]
            if not any(change.leave_out for change in here):
                row = self._train(parts, here, update=[*steps[number + 1 : number + 2]] != [step])
                rows.append(row)
                seen.append(step)
                if not any(change.unseen for change in here):
                    events += self._look(step, row)
            self.step = step
            tick()
            if until_moved and self._moved(events, start):
                break
        event = self._moved(events, start)
        signals_SN = torch.stack(rows).cpu() if rows else torch.empty(0, 3 * len(self.module.schema.tasks) + 1)
        return Trajectory(name=name, steps=seen, signals_SN=signals_SN, event=event)

    def task_gradients(self, parts: Sequence[Batch], names: Iterable[str]) -> list[dict[str, Tensor]]:
        """Gradient of each task's loss alone, by parameter; the AUC counts the rows, nothing else changes."""
        wanted = set(names)
        found = []
        for task in range(len(self.module.schema.tasks)):
            self.optimizer.zero_grad()
            others = {i: 0.0 for i in range(len(self.module.schema.tasks)) if i != task}
            self._backward(parts, [Change(at=frozenset(), weights=others)])
            found.append(
                {
                    n: p.grad.to_dense().clone()
                    for n, p in self.module.net.named_parameters()
                    if n in wanted and p.grad is not None
                }
            )
        self.optimizer.zero_grad()
        return found

    @torch.no_grad()
    def row_losses(self, parts: Sequence[Batch]) -> list[Tensor]:
        """By share, the weighted sum over tasks of each row's loss, [B]; infinite where it is not finite."""
        schema, found = self.module.schema, []
        binary_T = torch.tensor([task.type == "binary" for task in schema.tasks], device=self.device)
        for part in (part.to(self.device) for part in parts):
            z_BT = torch.where(part.mask_BT, self.module.net(part).float(), 0.0)
            y_BT = torch.where(part.mask_BT, part.labels_BT, 0.0)
            log_loss_BT = F.binary_cross_entropy_with_logits(z_BT, y_BT, reduction="none")
            losses_BT = torch.where(binary_T, log_loss_BT, (z_BT - y_BT).square()) * part.mask_BT
            losses_B = (losses_BT * self.module.loss.weight_T).sum(1)
            found.append(torch.where(losses_B.isfinite(), losses_B, torch.inf).cpu())
        return found

    def _train(self, parts: Sequence[Batch], changes: Sequence[Change], *, update: bool) -> Tensor:
        """One batch; an update where it completes a step."""
        row = self._backward(parts, changes)
        if not update:
            return row
        frozen = {name for change in changes for name in change.frozen}
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        for param in params:
            if self._names[id(param)] in frozen:
                param.grad = None
        if self.settings.clip and self.settings.clip_by_value:
            nn.utils.clip_grad_value_(params, self.settings.clip)
        elif self.settings.clip:
            nn.utils.clip_grad_norm_(params, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        return row

    def _backward(self, parts: Sequence[Batch], changes: Sequence[Change]) -> Tensor:
        """Adds the batch's gradients to those at hand; returns its signals, [3 T + 1]."""
        for change in changes:
            if change.edit is not None:
                parts = [change.edit(part) for part in parts]
        parts = [part.to(self.device) for part in parts]
        ranks = len(parts)
        counts_T = torch.stack([part.mask_BT.sum(0) for part in parts]).sum(0)
        sums: dict[Tensor, Tensor] = self._taken() if ranks > 1 else {}
        logits, losses = [], []
        with self._weighted(changes):
            for part in parts:
                with self._precision():
                    logits_BT = self.module.net(part)
                    loss = self.module.loss.local(
                        logits_BT, part.labels_BT, part.mask_BT, counts_T=counts_T, ranks=ranks
                    )
                (loss.total / self.settings.accumulate).backward()
                logits.append(logits_BT.detach())
                losses.append(loss.task_T)
                if ranks > 1:
                    for param, grad in self._taken().items():
                        sums[param] = sums[param] + grad / ranks if param in sums else grad / ranks
        for param, grad in sums.items():
            param.grad = grad
        losses_T = torch.stack(losses).sum(0) / ranks if ranks > 1 else losses[0]
        return self._signals(losses_T, torch.cat(logits), parts)

    def _signals(self, losses_T: Tensor, logits_BT: Tensor, parts: Sequence[Batch]) -> Tensor:
        auc = self.module.train_auc
        with torch.no_grad():
            labels_BT = torch.cat([part.labels_BT for part in parts])
            auc.update(logits_BT, labels_BT, torch.cat([part.mask_BT for part in parts]))
            stats = auc.stats()
            return pack(losses_T, stats.auc_T, stats.spread_T, stats.nonfinite_T.sum() > 0)

    def _moved(self, events: Sequence[Event], start: int) -> Event | None:
        """The first divergence, settled or open; what began before the start is none of these batches' doing."""
        found = [event for event in (*events, self.detector.suspicion) if event is not None]
        return next((event for event in found if event.kind != "shift" and event.step > start), None)

    def _look(self, step: int, row: Tensor) -> list[Event]:
        tasks = len(self.module.schema.tasks)
        self.detector.update(step, row[:tasks], row[tasks : 2 * tasks], row[2 * tasks : 3 * tasks], row[-1])
        return self.detector.poll(wait=True)

    def _taken(self) -> dict[Tensor, Tensor]:
        """The gradients at hand, taken away from their parameters."""
        found: dict[Tensor, Tensor] = {}
        for param in self.module.net.parameters():
            if param.grad is not None:
                found[param], param.grad = param.grad, None
        return found

    def _weighted(self, changes: Sequence[Change]) -> AbstractContextManager[None]:
        factors = {task: x for change in changes for task, x in (change.weights or {}).items()}
        return _Weights(self.module.loss, factors) if factors else nullcontext()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.settings.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.settings.autocast)

    def _new_detector(self) -> DivergenceDetector:
        return DivergenceDetector(self.module.schema.task_names, device=self.device, **self.settings.detector)


class _Weights(AbstractContextManager[None]):
    """Other task weights for a while."""

    def __init__(self, loss: MultitaskLoss, factors: Mapping[int, float]) -> None:
        self._loss, self._factors = loss, factors

    def __enter__(self) -> None:
        self._before = self._loss.weight_T
        weight_T = self._before.clone()
        for task, factor in self._factors.items():
            weight_T[task] *= factor
        self._loss.weight_T = weight_T

    def __exit__(self, *_: object) -> None:
        self._loss.weight_T = self._before
