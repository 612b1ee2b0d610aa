"""What a run resumes from: a checkpoint that is known to fit before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ranker.errors import UserError
from ranker.runs.checkpoint_files import by_step, damage, step_of
from ranker.runs.run_folder import (
    CALLBACKS,
    DATA_MODULE,
    GLOBAL_STEP,
    OPTIMIZER_SETTINGS,
    STABILITY,
    STATE_DICT,
    TRACKED,
    RunFolder,
    read_summary,
)
from ranker.training.hyperparameters import settings_of
from ranker.training.module import OptimizerFactory, RankingModule
from ranker.training.table_checkpoints import read_checkpoint

# Hyperparameters that act only where an accumulator is made.
ONLY_AT_THE_START = ("initial_accumulator_value",)


@dataclass(frozen=True)
class Resumption:
    """The place from which a run goes on.

    Attributes:
        path: the checkpoint.
        step: its optimizer step.
        position: number of the next batch.
        tracked: number of rows that W&B had then; None if it is not known.
    """

    path: Path
    step: int
    position: int
    tracked: int | None = None

    @classmethod
    def of(cls, path: Path, module: RankingModule, *, other: OptimizerFactory | None = None) -> Resumption:
        """Reads where a checkpoint stands. Reads no weights: the file is mapped.

        Args:
            path: an intact checkpoint.
            module: the module of this run, as it was built.
            other: the optimizer that takes over at the first rollback, if one does.

        Raises:
            UserError: the file is no checkpoint of a run, or its weights or optimizer do not fit the configuration.
        """
        try:
            saved = read_checkpoint(path, light=True)
            weights, step, position = saved[STATE_DICT], int(saved[GLOBAL_STEP]), int(saved[DATA_MODULE]["position"])
        except Exception as error:  # torch raises many types of errors for an invalid file
            raise UserError(f"{path} is not a checkpoint of a run ({' '.join(str(error).split())[:120]})") from error
        _check_weights(path, weights, module.state_dict())
        rolled_back = saved.get(CALLBACKS, {}).get(STABILITY, {}).get("rollbacks")
        factory = other if other is not None and rolled_back else module.optimizer_factory
        optimizer = module.make_optimizer(factory)
        _check_settings(path, saved.get(OPTIMIZER_SETTINGS), settings_of(optimizer))
        _check_optimizer(path, saved, optimizer)
        return cls(path, step, position, saved.get(TRACKED))


def sound_checkpoint(folder: RunFolder, *, keep_lost: bool, say: Callable[[str], None]) -> Path:
    """The checkpoint to go on from: the newest one, or the newest from before the divergence of a run that was lost.

    Args:
        folder: the run folder.
        keep_lost: go on from the weights of a lost run.
        say: told in one line where a lost run goes on.

    Raises:
        UserError: there is no checkpoint, or none from before the divergence.
    """
    newest = folder.newest_checkpoint()
    state = _stability_of(newest)
    first = _lost_since(folder, state)
    if first is None:
        return newest
    lost = f"{folder.path} diverged at step {first}"
    if keep_lost:
        say(f"{lost}; going on from step {step_of(newest)} with the lost weights (callbacks.divergence.stop=false)")
        return newest
    for path in reversed(by_step(folder.checkpoints)):
        undone = any(r["to_step"] < step_of(path) <= r["step"] for r in state.get("rollbacks", ()))
        if step_of(path) < first and not undone and damage(path) is None:
            say(
                f"{lost}; going back to step {step_of(path)}, the last checkpoint before that. Without a change, such "
                "as lr_mult=0.5 or callbacks.rollback.tries=3, it will be lost again"
            )
            return path
    raise UserError(
        f"{lost}, and no checkpoint from before that is kept: start a new run with a lower lr_mult or "
        "mitigation=rollback_clippy (callbacks.divergence.stop=false goes on from the lost weights)"
    )


def _stability_of(path: Path) -> dict[str, Any]:
    """The state of the stability callback in a checkpoint; empty if the file is none, which ``Resumption.of`` says."""
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[CALLBACKS][STABILITY]
    except Exception:  # torch raises many types of errors for an invalid file
        return {}
    return found


def _lost_since(folder: RunFolder, state: Mapping[str, Any]) -> int | None:
    """First step of the divergence that ended a run, from its newest checkpoint or its events; None if none did."""
    detector, summary = state.get("detector"), read_summary(folder.path)
    full = detector["classifier"]["full_divergence"] if detector else None
    if full is None and summary is not None and summary["status"] == "diverged":  # the verdict of the hold-out
        full = folder.last_event("full")
    return None if full is None else int(full["step"])


def _check_weights(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name in sorted(saved.keys() ^ own.keys()):
        where = "is only in the checkpoint" if name in saved else "is not in the checkpoint"
        raise UserError(f"{path} does not fit the model: {name} {where}; a resumed run keeps its model")
    for name, value in own.items():
        if isinstance(value, Tensor) and saved[name].shape != value.shape:
            shapes = f"{list(saved[name].shape)} there and {list(value.shape)} here"
            raise UserError(f"{path} does not fit the model: {name} is {shapes}; a resumed run keeps its model")


def _check_settings(path: Path, saved: list[dict[str, Any]] | None, own: list[dict[str, Any]]) -> None:
    """Refuses settings of the optimizer that cannot change while its state is kept."""
    if saved is None:
        return  # of an older version
    if len(own) != len(saved):
        raise UserError(f"optim: {path} has {len(saved)} groups of parameters and this configuration {len(own)}")
    for before, now in zip(saved, own, strict=True):
        for name in ("method", "param_names", *ONLY_AT_THE_START):
            if before.get(name) != now.get(name):
                shown = "" if name == "param_names" else f" ({before.get(name)} in the checkpoint, {now.get(name)} now)"
                raise UserError(f"optim: {name} cannot change in a resumed run{shown}; start a new run")


def _check_optimizer(path: Path, saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Loads the optimizer's state into one that is thrown away; tensors are not copied."""
    try:
        optimizer.load_state_dict(saved["optimizer_states"][0])
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"optim: the state in {path} does not fit: {' '.join(str(error).split())}") from error
