"""Snapshots: the whole state of a training run, taken and given back while it runs."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ranker.data.datamodule import RankingDataModule
from ranker.errors import UserError
from ranker.training.divergence_watch import DivergenceWatch
from ranker.training.module import RankingModule

FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """Everything that decides what a run does next, as of the end of a step, on the CPU and of this rank.

    Attributes:
        step: optimizer steps taken.
        position: number of the next batch, over all ranks.
        state: plain dicts, lists, numbers, strings and CPU tensors. ``module`` (weights and running metrics; this
            rank's own ``train_auc``), ``optimizer``, ``schedulers``, ``precision``, ``rng``, ``data`` (position and
            dense statistics) and ``detector`` (empty where nothing watches). Nobody writes into it.
        healthy: whether the detector had nothing to object to, the step itself included.
    """

    step: int
    position: int
    state: Mapping[str, Any]
    healthy: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return _nbytes(self.state)

    def save(self, path: Path) -> None:
        """Writes a file that ``torch.load(weights_only=True)`` reads; it appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        fields = {"step": self.step, "position": self.position, "state": self.state, "healthy": self.healthy}
        try:
            torch.save({"format": FORMAT, **fields}, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # what a full disk left of it

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Reads a file of ``save`` without running any code from it.

        Raises:
            UserError: it is no snapshot, or one of another version.
        """
        try:
            fields = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever a damaged file makes torch raise
            raise UserError(f"snapshot {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise UserError(f"{path} is no snapshot of this version (format {FORMAT})")
        return cls(**fields)


def capture(trainer: pl.Trainer, module: RankingModule) -> Snapshot:
    """Takes a snapshot of a running fit; call it between two steps, such as in ``on_train_batch_end``.

    Gradients are not part of it: with ``accumulate_grad_batches`` call it where a step has just been taken. No rank
    waits for another. Cost: one copy of weights and optimizer state to the host, and on a GPU one wait for the device.
    """
    watch, datamodule = _watch(trainer), _datamodule(trainer)
    detector: dict[str, Any] = watch.state_dict() if watch is not None else {}  # judges this step too
    state = {
        "module": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "rng": _rng(module.device),
        "data": datamodule.state_dict(),
        "detector": detector,
    }
    position, healthy = datamodule.position, is_healthy(trainer)
    return Snapshot(step=trainer.global_step, position=position, state=_copy(state), healthy=healthy)


def is_healthy(trainer: pl.Trainer) -> bool:
    """Whether the detector has nothing to object to, the step just taken included; True where nothing watches."""
    watch = _watch(trainer)
    return watch is None or watch.detector is None or watch.detector.status == "healthy"


def restore(
    snapshot: Snapshot, trainer: pl.Trainer, module: RankingModule, *, skip_batches: int = 0, step: bool = False
) -> None:
    """Puts a running fit into the state of a snapshot, bit by bit; the next batch is the one that came next then.

    Call it between two steps (``on_train_start``, ``on_train_batch_end``), on every rank, with that rank's snapshot.
    The trainer's own batch in hand and those read ahead are dropped. The snapshot can be used again.

    Args:
        snapshot: what ``capture`` took in this run, or in one of the same configuration and number of ranks.
        trainer: Lightning's trainer, fitting.
        module: the module that is fitted.
        skip_batches: leave out so many batches from the snapshot's position on.
        step: also set ``trainer.global_step`` back. A rollback does not: trackers and files want steps that count up.
    """
    state = _copy(snapshot.state)  # the optimizer keeps the tensors it is given, and writes into them
    module.load_state_dict(state["module"])
    optimizer = trainer.optimizers[0]
    optimizer.load_state_dict(state["optimizer"])
    optimizer.zero_grad(set_to_none=True)
    for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
        config.scheduler.load_state_dict(saved)
    if state["precision"]:
        trainer.precision_plugin.load_state_dict(state["precision"])
    watch = _watch(trainer)
    if watch is not None and watch.detector is not None and state["detector"]:
        watch.detector.load_state_dict(state["detector"]["detector"] | {"unreported": []})  # they were, since
    _go_on_from(state["data"], skip_batches, trainer)
    if step:
        taken = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        taken.ready = taken.completed = snapshot.step
    _set_rng(state["rng"], module.device)  # last: making loaders may draw


def _go_on_from(data: dict[str, Any], skip_batches: int, trainer: pl.Trainer) -> None:
    """Moves the data module, and has Lightning, which holds a batch ahead, fetch anew."""
    _datamodule(trainer).go_back(data)
    _datamodule(trainer).skip(skip_batches)
    loop = trainer.fit_loop
    if loop._data_fetcher is not None:
        iter(loop._data_fetcher)
        loop.epoch_loop.batch_progress.is_last_batch = loop._data_fetcher.done


def _copy(value: Any) -> Any:
    """The same with tensors of its own, on the CPU, and plain dicts around them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copy, value))
    return value


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0


def _rng(device: torch.device) -> dict[str, Any]:
    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, spare = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(numbers), spare],
    }


def _set_rng(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, numbers, spare = state["python"]
    random.setstate((version, tuple(numbers.tolist()), spare))


def _watch(trainer: pl.Trainer) -> DivergenceWatch | None:
    return next((c for c in trainer.callbacks if isinstance(c, DivergenceWatch)), None)  # type: ignore[attr-defined]


def _datamodule(trainer: pl.Trainer) -> RankingDataModule:
    datamodule: RankingDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule
