"""The callback that measures early signs of divergence, per layer and at an interval."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from ranker.data.batch import Batch
from ranker.errors import UserError, suggest
from ranker.runs import metric_names
from ranker.stability import LayerActivations, ReportsSteps, adaptation, layer_signs, task_gradients
from ranker.stability.early_signs import max_over_ranks
from ranker.training.fit import Fit
from ranker.training.lightning_private import is_compiled
from ranker.training.module import RankingModule
from ranker.training.training_step import batch_loss

log = logging.getLogger(__name__)

WhatIf = Callable[..., Mapping[str, Mapping[str, Tensor]]]


class EarlySigns(Callback):
    """Records quantities that change before the loss does, per layer and every few steps.

    ``signs/<role>/<sign>``, role from ``Ranker.layer_names``:

        grad_norm          norm2(g) of the layer's weight, before gradient_clip_val
        grad_over_weight   norm2(g) / norm2(w), which AGC bounds
        update_max         infinity norm of r, which Clippy bounds
        adapted            share of the weight's coordinates whose accumulator has left its start, G > 2 G_0
        sigma              factor of the optimizer in use; 1 where its method has none
        sigma_<label>      factor that another rule would have chosen on the same g, G and w
        dead_relus         share of the layer's units that are 0 for every row of the batch
        activation_max     infinity norm of the layer's output, after its ReLU; for a head, of its logit

    ``sigma/<parameter>`` of every tensor that a rule may clip. ``signs/task_norm/<task>`` and
    ``signs/task_cosine/<a>/<b>``: norms of the tasks' weighted gradients on the top shared layer's weight, and the
    cosines between them.

    Values stay on the device and are read when metrics are written (``train.log_every``). Every rank measures, from the
    reduced gradients and the largest activations of all ranks, and rank 0 writes. With accumulated gradients,
    activations and tasks are those of the last batch of a step. If the net is compiled with torch.compile, activations
    and tasks are left out, because hooks inside it do not run. An optimizer without ``ReportsSteps`` has no sigma, and
    r only if it keeps Adagrad's accumulator.

    Args:
        every: steps between two measurements; 1 for figures, 0 to switch off.
        roles: which of the net's layers; None for all.
        norms: whether to measure grad_norm, grad_over_weight, update_max and adapted.
        activations: whether to measure dead_relus and activation_max.
        sigma: whether to record the sigma of the optimizer in use.
        task_gradients: measurements between two of the tasks' gradients, each of which costs about a step; 0 for never.
        what_if: called with the optimizer before its step, and with ``names`` of parameters; returns sigma per label
            and name. None to leave it out.

    Attributes:
        due: whether the batch in hand is measured.

    Raises:
        UserError: a number is negative.

    Source: Tang et al. (2023), Figures 4, 6 and 8.
    """

    def __init__(
        self,
        *,
        every: int = 20,
        roles: Sequence[str] | None = None,
        norms: bool = True,
        activations: bool = True,
        sigma: bool = True,
        task_gradients: int = 10,
        what_if: WhatIf | None = None,
    ) -> None:
        for name, value in (("every", every), ("task_gradients", task_gradients)):
            if value < 0:
                raise UserError(f"callbacks.early_signs.{name} must be 0 (off) or more, got {value}")
        self._every = every
        self._roles = roles
        self._norms, self._activations, self._sigma = norms, activations, sigma
        self._task_gradients = task_gradients
        if isinstance(what_if, partial):
            # Each call of Hydra's partial walks through all loaded modules, which takes 35 ms.
            what_if = partial(what_if.func, *what_if.args, **what_if.keywords)
        self._what_if = what_if
        self._names: dict[str, str] = {}  # of each role's weight
        self._weights: dict[str, nn.Parameter] = {}
        self._shared: nn.Parameter | None = None
        self._watched: LayerActivations | None = None
        self._watching: AbstractContextManager[None] | None = None
        self.due = False
        self._stepped = False
        self._logits_BT: Tensor | None = None
        self._seen: dict[str, Tensor] = {}
        self._unread: list[tuple[int, list[str], Tensor]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the layers, and refuses what cannot be measured."""
        if not self._every:
            return
        net = Fit(trainer).module.net
        every_layer: dict[str, str] = net.layer_names()  # type: ignore[operator]
        layers = _chosen(every_layer, self._roles)
        found = {role: _weight_of(net, name) for role, name in layers.items()}
        self._names = {role: name for role, (name, _) in found.items()}
        self._weights = {role: weight for role, (_, weight) in found.items()}
        self._shared = _weight_of(net, every_layer["bottom_top"])[1] if "bottom_top" in every_layer else None
        inside = {role: name for role, name in layers.items() if not role.startswith("head/")}
        self._watched = LayerActivations(net, inside) if self._activations else None
        unseen = is_compiled(net) and (self._activations or self._task_gradients)
        if unseen and trainer.is_global_zero:
            log.info("early_signs: the net is compiled: no dead_relus, activation_max and gradients by task")
        try:
            self._others_sigma(trainer.optimizers[0], names=())
        except (TypeError, ValueError) as error:
            raise UserError(f"callbacks.early_signs.what_if: {error}") from error

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Adds hooks to the forward pass that follows, if a measurement is due."""
        self.due = bool(self._every) and (trainer.global_step + 1) % self._every == 0
        self._batch: Batch = batch
        net = Fit(trainer).module.net
        if self.due and not is_compiled(net):
            self._handles = [
                net.register_forward_pre_hook(self._entered, prepend=True),
                net.register_forward_hook(self._left, always_call=True),
            ]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Measures the forward pass while its graph exists."""
        if not self.due or self._logits_BT is None:
            return
        if self._watched is not None:
            self._seen |= self._activation_signs(Fit(trainer).module)
        number = (trainer.global_step + 1) // self._every
        if self._task_gradients and number % self._task_gradients == 0 and self._shared is not None:
            self._seen |= self._task_signs(Fit(trainer).module)
        self._logits_BT = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measures the gradients, and computes what other rules would do with them."""
        if not self.due:
            return
        self._stepped = True  # with accumulated gradients not every batch ends with a step
        if self._norms:
            for role, signs in layer_signs(self._weights.items(), optimizer).items():
                self._seen |= {metric_names.sign(role, name): value for name, value in signs._asdict().items()}
        self._seen |= self._others_sigma(optimizer, names=tuple(self._names.values()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures what the optimizer did, and keeps the values until metrics are written."""
        step = trainer.global_step
        if self._stepped:
            self._seen |= self._step_signs(trainer.optimizers[0])
            if self._seen:
                row = torch.stack([value.detach().to(pl_module.device, torch.float32) for value in self._seen.values()])
                self._unread.append((step, list(self._seen), row))
            self._seen, self._stepped = {}, False
        if step % Fit(trainer).module.log_every == 0:
            self._read(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what is left."""
        self._read(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes the last values before a crash, if the device still responds."""
        with suppress(RuntimeError):
            self._read(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The values that are not written yet: a run that resumes writes them at the step at which this one would."""
        unread = [[step, names, row.cpu()] for step, names, row in self._unread]
        return {"unread": unread} if unread else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the values of a checkpoint."""
        self._unread = [(int(step), list(names), row) for step, names, row in state_dict["unread"]]

    def _entered(self, net: nn.Module, _inputs: object) -> None:
        if net.training and self._watched is not None:  # scoring a window runs in evaluation mode
            self._watching = self._watched.measuring()
            self._watching.__enter__()

    def _left(self, net: nn.Module, _inputs: object, output: Tensor | None) -> None:
        if not net.training:
            return
        if self._watching is not None:
            self._watching.__exit__(None, None, None)
            self._watching = None
        for handle in self._handles:
            handle.remove()
        self._logits_BT = output

    def _activation_signs(self, module: RankingModule) -> dict[str, Tensor]:
        assert self._watched is not None
        assert self._logits_BT is not None
        seen = {}
        for role, found in self._watched.compute().items():
            seen[metric_names.sign(role, "activation_max")] = found.largest
            if found.dead is not None:
                seen[metric_names.sign(role, "dead_relus")] = found.dead
        logits_BT = self._logits_BT.detach()
        (largest_T,) = max_over_ranks([torch.maximum(-logits_BT.amin(0), logits_BT.amax(0))])
        for task, largest in zip(module.schema.task_names, largest_T.unbind(), strict=True):
            if f"head/{task}" in self._weights:
                seen[metric_names.sign(f"head/{task}", "activation_max")] = largest
        return seen

    def _task_signs(self, module: RankingModule) -> dict[str, Tensor]:
        """Gradients per task. Each task's loss depends on one column of the logits, so each starts from that column."""
        assert self._logits_BT is not None
        assert self._shared is not None
        logits_BT = self._logits_BT
        leaf_BT = logits_BT.detach().requires_grad_()
        loss = batch_loss(module.loss, leaf_BT, self._batch)
        (slope_BT,) = torch.autograd.grad(loss.total, leaf_BT)
        columns = [(z_B * s_B).sum() for z_B, s_B in zip(logits_BT.unbind(1), slope_BT.unbind(1), strict=True)]
        found = task_gradients(columns, [self._shared])
        tasks = module.schema.task_names
        seen = {
            f"{metric_names.TASK_NORM}{task}": norm for task, norm in zip(tasks, found.norm_T.unbind(), strict=True)
        }
        for a, first in enumerate(tasks):
            for b in range(a + 1, len(tasks)):
                seen[f"{metric_names.TASK_COSINE}{first}/{tasks[b]}"] = found.cosine_TT[a, b]
        return seen

    def _others_sigma(self, optimizer: Optimizer, *, names: Sequence[str]) -> dict[str, Tensor]:
        if self._what_if is None or not isinstance(optimizer, ReportsSteps):
            return {}
        found = self._what_if(optimizer, names=names)
        return {
            metric_names.sign(role, f"sigma_{label}"): sigmas[name]
            for label, sigmas in found.items()
            for role, name in self._names.items()
            if name in sigmas
        }

    def _step_signs(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The accumulators, and what the optimizer reports of its step; its r is exact for every update rule."""
        seen = {}
        for role, weight in self._weights.items() if self._norms else ():
            if (adapted := adaptation(optimizer, [weight])) is not None:
                seen[metric_names.sign(role, "adapted")] = adapted.share
        if not isinstance(optimizer, ReportsSteps):
            return seen
        steps = optimizer.last_step()
        for role, name in self._names.items():
            if name in steps and self._sigma:
                seen[metric_names.sign(role, "sigma")] = steps[name].sigma
            size = metric_names.sign(role, "update_max")
            if name in steps and size in self._seen:
                exact = steps[name].direction_max
                seen[size] = torch.where(exact.isnan(), self._seen[size].to(exact), exact)
        if self._sigma:
            seen |= {metric_names.sigma(name): step.sigma for name, step in steps.items() if step.clipped}
        return seen

    def _read(self, trainer: pl.Trainer) -> None:
        unread, self._unread = self._unread, []
        if not unread or not trainer.is_global_zero:
            return
        numbers = iter(torch.cat([row.to(unread[-1][2].device) for *_, row in unread]).tolist())
        for step, names, _ in unread:
            Fit(trainer).module.record({name: next(numbers) for name in names}, step=step)


def _chosen(layers: dict[str, str], roles: Sequence[str] | None) -> dict[str, str]:
    for role in roles or ():
        if role not in layers:
            raise UserError(f"callbacks.early_signs.roles: no layer '{role}'; {suggest(role, layers)}")
    return {role: name for role, name in layers.items() if roles is None or role in roles}


def _weight_of(net: nn.Module, layer: str) -> tuple[str, nn.Parameter]:
    """Name and value of a layer's weight; the largest one of a layer that has several."""
    below = dict(net.get_submodule(layer).named_parameters(prefix=layer))
    name = max(below, key=lambda name: below[name].numel())
    return name, below[name]
