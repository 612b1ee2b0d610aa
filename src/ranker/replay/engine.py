"""Trains the batches of a capsule again, in one process and without Lightning, with the same arithmetic as the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ranker.capsules.training_state import Trained, TrainingState
from ranker.data.batch import Batch
from ranker.losses import Loss, MultitaskLoss
from ranker.models.admission import observe
from ranker.replay.trajectory import Trajectory
from ranker.stability import DivergenceDetector, Event
from ranker.stability.detector_interface import row_width, unpack
from ranker.training.training_step import (
    StepSignals,
    Trainable,
    batch_counts,
    clip_gradients,
    forward_loss,
    make_step_cut,
    step_signals,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the run took its steps.

    Attributes:
        accumulate: batches per step.
        clip: bound on the gradient; None for none.
        clip_by_value: bound each coordinate instead of the norm.
        autocast: lower precision of the forward pass; None for float32 throughout.
        detector: fields of ``DetectorSettings``.
    """

    accumulate: int = 1
    clip: float | None = None
    clip_by_value: bool = False
    autocast: torch.dtype | None = None
    detector: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a replay changes at some batches.

    Attributes:
        at: places of those batches.
        leave_out: do not train on them, and do not read their losses.
        unseen: train on them, but do not show their losses to the detector: the model after them is what matters.
        edit: changes the rows of each rank's share.
        weights: factor on the loss of a task, by place of the task.
        frozen: names of parameters that are not updated.
    """

    at: frozenset[int]
    leave_out: bool = False
    unseen: bool = False
    edit: Callable[[Batch], Batch] | None = None
    weights: Mapping[int, float] | None = None
    frozen: frozenset[str] = frozenset()


class Engine:
    """A model, its optimizer and the detector, stepped by hand.

    The shares of several ranks are trained one after the other. Each gradient is divided by the number of ranks and
    added up in the order of the ranks, as DDP does: for two ranks the sum is the same to the last bit, for more it is
    equal up to rounding, because their reduction may add in another order.

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
        self._step_cut = make_step_cut(module.net, self.optimizer)
        self.detector = self._new_detector()
        self._names = {id(p): name for name, p in module.net.named_parameters()}

    def state(self) -> TrainingState:
        """A copy of the current state."""
        return self._trained().capture(self.step)

    def restore(self, state: TrainingState) -> None:
        """Puts a state back; the state is not changed."""
        self.step, self.detector = state.step, self._new_detector()
        self._trained().restore(state)

    def restore_history(self, state: TrainingState) -> None:
        """Puts back all but weights and optimizer: training AUC, detector and random numbers."""
        self.step, self.detector = state.step, self._new_detector()
        self._trained().restore_history(state)
        self._step_cut.reset()  # another optimizer may keep other accumulators

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
            name: name of the trajectory.
            first: place of the first batch, for ``changes``.
            changes: what to change.
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
        signals_SN = torch.stack(rows).cpu() if rows else torch.empty(0, row_width(len(self.module.schema.tasks)))
        return Trajectory(name=name, steps=seen, signals_SN=signals_SN, event=event)

    def task_gradients(self, parts: Sequence[Batch], names: Iterable[str]) -> list[dict[str, Tensor]]:
        """Gradient of each task's loss alone, by parameter. The AUC counts the rows; nothing else changes."""
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
        """Per share, the weighted sum over tasks of each row's loss, [B]; infinite where it is not finite.

        A ranking loss is left out, because it belongs to pairs and lists of rows.
        """
        schema, found = self.module.schema, []
        binary_T = torch.tensor([task.type == "binary" for task in schema.tasks], device=self.device)
        for part in (part.to(self.device) for part in parts):
            z_BT = torch.where(part.mask_BT, self.module.loss.of_kept_rows(self.module.net(part).float()), 0.0)
            y_BT = torch.where(part.mask_BT, part.labels_BT, 0.0)
            log_loss_BT = F.binary_cross_entropy_with_logits(z_BT, y_BT, reduction="none")
            losses_BT = torch.where(binary_T, log_loss_BT, (z_BT - y_BT).square()) * part.mask_BT
            losses_B = (losses_BT * self.module.loss.weight_T).sum(1)
            losses_B = losses_B if part.weight_B is None else losses_B * part.weight_B
            found.append(torch.where(losses_B.isfinite(), losses_B, torch.inf).cpu())
        return found

    def _train(self, parts: Sequence[Batch], changes: Sequence[Change], *, update: bool) -> Tensor:
        """Trains on one batch, with an update if it completes a step; its signals, a row of ``pack``."""
        edited = parts
        for change in changes:
            if change.edit is not None:
                edited = [change.edit(part) for part in edited]
        observe(self.module.net, self.optimizer, [part.to(self.device) for part in edited])
        signals = self._backward(parts, changes)
        if not update:
            return signals.packed()
        frozen = {name for change in changes for name in change.frozen}
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        for param in params:
            if self._names[id(param)] in frozen:
                param.grad = None
        if self.settings.clip:
            clip_gradients(params, self.settings.clip, by_value=self.settings.clip_by_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        return signals.after_step(self._step_cut).packed()

    def _backward(self, parts: Sequence[Batch], changes: Sequence[Change]) -> StepSignals:
        """Adds the batch's gradients to those that are there; its signals."""
        for change in changes:
            if change.edit is not None:
                parts = [change.edit(part) for part in parts]
        parts = [part.to(self.device) for part in parts]
        ranks = len(parts)
        counts_T = torch.stack([batch_counts(self.module.loss, part) for part in parts]).sum(0)
        sums: dict[Tensor, Tensor] = self._taken() if ranks > 1 else {}
        logits: list[Tensor] = []
        losses: list[Loss] = []
        with self._weighted(changes):
            for part in parts:
                with self._precision():
                    logits_BT, loss = forward_loss(self.module, part, counts_T=counts_T, ranks=ranks)
                (loss.total / self.settings.accumulate).backward()
                logits.append(logits_BT.detach())
                losses.append(loss)
                if ranks > 1:
                    for param, grad in self._taken().items():
                        # A rank adds up the rows that occur twice before it sends a sparse gradient.
                        share = (grad.coalesce() if grad.is_sparse else grad) / ranks
                        sums[param] = sums[param] + share if param in sums else share
        for param, grad in sums.items():
            param.grad = grad
        labels_BT, mask_BT = torch.cat([p.labels_BT for p in parts]), torch.cat([p.mask_BT for p in parts])
        weights = [part.weight_B for part in parts if part.weight_B is not None]
        ranking = [loss.ranking_T for loss in losses if loss.ranking_T is not None]
        return step_signals(
            self.module,
            torch.cat(logits),
            labels_BT,
            mask_BT,
            losses_T=_mean([loss.task_T for loss in losses]),
            weight_B=torch.cat(weights) if weights else None,
            ranking_T=_mean(ranking) if ranking else None,
        )

    def _moved(self, events: Sequence[Event], start: int) -> Event | None:
        """The first divergence, over or still open, that began after the start: these batches caused no earlier one."""
        found = [event for event in (*events, self.detector.suspicion) if event is not None]
        return next((event for event in found if event.kind != "shift" and event.step > start), None)

    def _look(self, step: int, row: Tensor) -> list[Event]:
        self.detector.update(step, **unpack(row))
        return self.detector.poll(wait=True)

    def _taken(self) -> dict[Tensor, Tensor]:
        """The gradients, removed from their parameters."""
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

    def _trained(self) -> Trained:
        return Trained(
            net=self.module.net,
            optimizer=self.optimizer,
            schedule=self.schedule,
            train_auc=self.module.train_auc,
            detector=self.detector,
        )

    def _new_detector(self) -> DivergenceDetector:
        names = self.module.schema.task_names
        return DivergenceDetector(names, device=self.device, step_cut=self._step_cut, **self.settings.detector)


def _mean(shares: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(shares)).sum(0) / len(shares) if len(shares) > 1 else shares[0]


class _Weights(AbstractContextManager[None]):
    """Multiplies task weights by factors inside the block."""

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
