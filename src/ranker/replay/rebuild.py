"""Builds the replay engine from a configuration: the same model and optimizer that train.py would build."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.models.admission import admission_of
from ranker.parts import build_module
from ranker.replay.engine import Engine, Settings

_AUTOCAST = {"32-true": None, "32": None, "bf16-mixed": torch.bfloat16}


def build_engine(
    cfg: DictConfig, schema: Schema, *, device: torch.device | str = "cpu", places: Mapping[int, Tensor] | None = None
) -> Engine:
    """A model with new weights and its optimizer, in the state of step 0.

    Args:
        cfg: the configuration.
        schema: features and tasks.
        device: where to train.
        places: ``Capsule.places``.

    Raises:
        UserError: the configuration cannot be built, or trains in a precision that replay does not support.
    """
    precision = str(cfg.trainer.precision)
    if precision not in _AUTOCAST:
        raise UserError(f"trainer.precision {precision} cannot be replayed; known: {', '.join(_AUTOCAST)}")
    pl.seed_everything(cfg.seed, verbose=False)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    if cfg.trainer.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=cfg.trainer.deterministic == "warn")
    watched = OmegaConf.select(cfg, "callbacks.divergence.settings")
    settings = Settings(
        accumulate=cfg.trainer.accumulate_grad_batches,
        clip=cfg.trainer.gradient_clip_val,
        clip_by_value=cfg.trainer.gradient_clip_algorithm == "value",
        autocast=_AUTOCAST[precision],
        detector=dict(watched or {}),
    )
    try:
        module = build_module(cfg, schema)
        admission = admission_of(module.net)
        if admission is not None and places:
            admission.stand_for(places)
        return Engine(module, settings, device=device)
    except (TypeError, ValueError) as error:  # what torch.optim and the optim package raise
        raise error if isinstance(error, UserError) else UserError(f"optim: {error}") from error
