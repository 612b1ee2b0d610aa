"""Boundaries inside a run: at the end of each window, what a warm start does to the accumulators between two runs."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ranker.config import WarmStartSettings
from ranker.training import accumulators
from ranker.training.fit import Fit
from ranker.training.optimizer_transfer import state_by_name
from ranker.training.stability_callback import Stability


class Boundaries(Callback):
    """Does at the start of each window but the first what ``warm_start.accumulators`` does at the start of a run.

    A run over many days with ``data.window=24h`` then has the weights of a chain of runs of one day each, bit for bit,
    for each choice of accumulators and of ``warm_start.warmup_steps``. The rows of ``decay`` are those of the window
    that ended. A window that comes again after a rollback is begun again.

    Args:
        settings: what happens to the accumulators, and the steps of the new warm-up.
        stability: its detector forgets earlier samples of the accumulators where these are changed.
    """

    def __init__(self, settings: WarmStartSettings, stability: Stability) -> None:
        self._settings, self._stability = settings, stability
        self._window: int | None = None
        self._rollbacks = 0  # how many there were at the last batch
        self._rewarm_from = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Acts where the batch is the first of a later window."""
        fit = Fit(trainer)
        window, _ = fit.data.plan.locate(fit.data.position)
        last, self._window = self._window, window
        done = self._stability.rollbacks
        if len(done) > self._rollbacks:  # the accumulators are those after an earlier batch
            first = done[-1]["skipped_batches"][0]
            last = fit.data.plan.locate(first - 1)[0] if first else None
        self._rollbacks = len(done)
        if last is None or window <= last:
            return
        start, stop = fit.data.plan.rows(last)
        self._change(fit, rows=stop - start)
        fit.module.rewarm()
        self._rewarm_from = fit.module.rewarm_from

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on with the warm-up of the checkpoint."""
        Fit(trainer).module.rewarm_from = self._rewarm_from

    def state_dict(self) -> dict[str, Any]:
        """The window of the last batch and the start of the newest warm-up, for a checkpoint."""
        return {"window": self._window, "rewarm_from": self._rewarm_from, "rollbacks": self._rollbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        self._window, self._rewarm_from = state_dict["window"], state_dict["rewarm_from"]
        self._rollbacks = state_dict.get("rollbacks", len(self._stability.rollbacks))  # missing in older checkpoints

    @torch.no_grad()
    def _change(self, fit: Fit, *, rows: int) -> None:
        how = self._settings.accumulators
        if how == "keep":
            return
        optimizer = fit.trainer.optimizers[0]
        if fit.module.tables is not None:
            fit.module.tables.change_accumulators(self._settings, rows=rows)
        if how == "reset":
            optimizer.state.clear()  # each tensor's state is made at the next step, as that of a new optimizer
        else:
            now = state_by_name(fit.module.net, optimizer)
            wanted = accumulators.changed(now, optimizer.param_groups, self._settings, rows=rows)
            for name, param in fit.module.net.named_parameters():
                for key, value in wanted.get(name, {}).items():
                    if value is not now[name][key]:
                        # Another object: snapshots of touched rows, and full copies, go on with the one before.
                        optimizer.state[param][key] = value
        if self._stability.detector is not None and self._stability.detector.step_cut is not None:
            self._stability.detector.step_cut.reset()
