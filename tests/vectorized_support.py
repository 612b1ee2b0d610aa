"""Configurations of jobs, which by default may be trained as one, and what their summaries say but for times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ranker import config
from ranker.installation import conf_folder
from support import TINY

# Verdicts within the 24 steps of a tiny run.
QUICK_VERDICT = tuple(
    f"callbacks.divergence.settings.{name}"
    for name in (
        *("patience=4", "startup=1", "window=16", "proof_steps=4", "recovery_steps=6"),
        *("auc_patience=6", "unborn_patience=6"),
    )
)
TIMES = ("examples_per_second", "data_wait_fraction", "seconds", "vectorized", "vectorized_order", "order_seed")
Overrides = Sequence[str]


def job_config(*overrides: str) -> DictConfig:
    config.register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("config", [*TINY, *overrides])
        resolved = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
    assert isinstance(resolved, DictConfig)
    return resolved


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}
