"""A configuration, a model and an optimizer from outside the clone, with ``--config-dir`` and ``_target_``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from support import TINY, TWO_RANKS, finished, train_process

PARTS = """
import torch
from ranker.models import SharedBottom


class Doubled(SharedBottom):
    def forward(self, batch):
        return 2 * super().forward(batch)


def sgd(model_or_params, lr, name, momentum):
    return torch.optim.SGD(model_or_params.parameters(), lr=lr, momentum=momentum)
"""
MODEL = """
defaults: [small, _self_]
name: doubled
net:
  _target_: outside_parts.Doubled
"""
OPTIM = """
_target_: outside_parts.sgd
_partial_: true
name: plain_sgd
momentum: 0.9
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with modules of its own and a folder ``conf``."""
    for name, text in {
        "outside_parts.py": PARTS,
        "conf/model/doubled.yaml": MODEL,
        "conf/optim/sgd.yaml": OPTIM,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


SHORT = (*TINY, "model=doubled", "optim=sgd", "lr_mult=0.001", "train.max_steps=3", "train.eval_every=0")


def test_a_model_and_an_optimizer_from_outside_train(
    outside: Path, command_line: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(outside)

    command_line("--config-dir", str(outside / "conf"), *SHORT, f"hydra.run.dir={outside / 'run'}")

    run = finished(outside / "run")
    assert (run.summary["status"], run.summary["model"], run.summary["optim"]) == ("completed", "doubled", "plain_sgd")
    saved = OmegaConf.load(run.folder / "config.yaml")
    assert (saved.model.net._target_, saved.optim.momentum) == ("outside_parts.Doubled", 0.9)


@pytest.mark.slow
def test_other_processes_of_a_run_find_the_outside_folder_too(outside: Path) -> None:
    process = train_process(
        "--config-dir", str(outside / "conf"), *SHORT, *TWO_RANKS, f"hydra.run.dir={outside / 'run'}", path=outside
    )
    _, errors = process.communicate(timeout=250)

    assert process.returncode == 0, errors
    assert finished(outside / "run").summary["world_size"] == 2
