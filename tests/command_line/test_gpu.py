"""What only a GPU shows, through ``train.py``: ``make test-gpu``. Without one, the tests are skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support import ROOT, TINY, Finished, assert_equal, finished, metrics, newest_checkpoint, train_process

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

GPUS = torch.cuda.device_count()
ONE = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
TWO = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
STEPS = ("train.max_steps=20", "train.log_every=1", "lr_mult=0.1", "train.checkpoint_every=10")
CPU_OF_TINY = "trainer=cpu"


def on_gpu(folder: Path, *overrides: str, tiny: bool = True) -> Finished:
    settings = tuple(word for word in TINY if word != CPU_OF_TINY) if tiny else ()
    process = train_process(*settings, "trainer=gpu", *overrides, f"hydra.run.dir={folder}")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return finished(folder)


def losses(folder: Path) -> list[float]:
    return [float(row["train/loss"]) for row in metrics(folder) if "train/loss" in row]


@ONE
@pytest.mark.parametrize("optim", ["clippy", "agc", "lamb", "clippy_adam"])
def test_a_gpu_trains_as_the_cpu_does(train_tiny: Callable[..., Finished], tmp_path: Path, optim: str) -> None:
    cpu = train_tiny(tmp_path / "cpu", *STEPS, f"optim={optim}")
    gpu = on_gpu(tmp_path / "gpu", *STEPS, f"optim={optim}")
    assert losses(gpu.folder) == pytest.approx(losses(cpu.folder), rel=1e-2)


@ONE
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])  # 16-mixed with a scaler of the loss
def test_half_precision_trains_nearly_as_float32(tmp_path: Path, precision: str) -> None:
    whole = on_gpu(tmp_path / "whole", *STEPS)
    half = on_gpu(tmp_path / "half", *STEPS, f"trainer.precision={precision}")
    assert losses(half.folder) == pytest.approx(losses(whole.folder), rel=0.1)
    assert losses(half.folder) != losses(whole.folder), "it did compute in half precision"


@ONE
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])  # the scaler's state is part of a checkpoint
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, precision: str) -> None:
    settings = (*STEPS, f"trainer.precision={precision}", "trainer.deterministic=true")
    whole = on_gpu(tmp_path / "whole", *settings)
    part = on_gpu(tmp_path / "part", *settings, "train.max_steps=10")
    process = train_process(f"resume={part.folder}", "train.max_steps=20")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    expected, got = newest_checkpoint(whole.folder), newest_checkpoint(part.folder)
    for name in ("state_dict", "optimizer_states"):
        assert_equal(expected[name], got[name], name)


@ONE
def test_batches_are_pinned_and_copied_while_the_gpu_computes(tmp_path: Path) -> None:
    run = on_gpu(tmp_path / "run", "logger=csv", "train.max_steps=100", "train.eval_every=0", tiny=False)
    assert run.summary["data_wait_fraction"] < 0.2


@TWO
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_ranks_on_nccl_train_as_one(tmp_path: Path, trainer: str) -> None:
    one = on_gpu(tmp_path / "one", *STEPS)
    two = on_gpu(tmp_path / "two", *STEPS, f"trainer={trainer}", "trainer.accelerator=gpu", "trainer.devices=2")
    assert two.summary["world_size"] == 2
    assert losses(two.folder) == pytest.approx(losses(one.folder), rel=1e-2)


@ONE
def test_the_speed_and_use_of_a_gpu_at_the_papers_widths_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "bench_scale.py"), "--json", str(out)]
    environment = os.environ | {"WANDB_MODE": "offline"}
    subprocess.run([*command, "--models", "large", "--steps", "60"], check=True, env=environment, timeout=800)
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert rows["large, clippy, bf16-mixed: model FLOP utilisation"]["value"] > 0.05
