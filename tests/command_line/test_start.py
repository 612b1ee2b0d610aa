"""What the start of a command imports. Told by names and not by time, which depends on the machine.

``python train.py --help`` takes below 2 s of CPU and a run about 5 s to its first step only while this holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT, TINY, train_process

HEAVY = (
    "torch",
    "numpy",
    "polars",
    "pyarrow",
    "pytorch_lightning",
    "torchmetrics",
    "wandb",
    "matplotlib",
    "scipy",
    "rich",
)
LISTED = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
print("LOADED", json.dumps(sorted(sys.modules)))
"""
AFTER = """
import sys
from ranker import deferred
deferred.defer()
from torchmetrics import Metric
assert "torchmetrics.image" not in sys.modules and "scipy" not in sys.modules
import torchmetrics, torchmetrics.functional, torchmetrics.classification
assert torchmetrics.Accuracy(task="binary") is not None
assert issubclass(torchmetrics.Accuracy, Metric) and torchmetrics.Metric is Metric
assert callable(torchmetrics.functional.accuracy) and "SumMetric" in torchmetrics.__all__
assert not hasattr(torchmetrics, "no_such_name")
deferred.defer()
import wandb
deferred.defer()
import wandb.sdk.launch
assert "wandb.sdk.launch.agent" not in sys.modules
assert callable(wandb.sdk.launch.launch_add) and "wandb.sdk.launch.agent" in sys.modules
print("whole")
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    "command", [("train.py", "--help"), ("scripts/stability.py", "--help"), ("train.py", "--cfg", "job")]
)
def test_help_and_configuration_need_no_numbers(command: tuple[str, ...]) -> None:
    done = python("-c", LISTED, *command)

    loaded = json.loads(done.stdout.split("LOADED ")[1])
    assert not set(HEAVY) & set(loaded)


def test_optim_imports_torch_and_little_more() -> None:
    done = python("-c", "import sys, torch; before = set(sys.modules); import optim; print(*set(sys.modules) - before)")

    added = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert added <= {"optim", "torch"}
    assert not [name for name in done.stdout.split() if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))]


def test_a_run_imports_only_what_it_uses_and_warns_of_nothing(tmp_path: Path) -> None:
    seen = tmp_path / "modules.json"
    process = train_process(
        *TINY,
        "logger=[wandb,tensorboard]",
        f"hydra.run.dir={tmp_path / 'run'}",
        "train.max_steps=2",
        "train.eval_every=0",
        "+callbacks.seen._target_=modules_seen.ModulesSeen",
        f"+callbacks.seen.file={seen}",
        path=ROOT / "tests",
    )
    _, errors = process.communicate(timeout=300)

    assert process.returncode == 0, errors
    assert "Warning" not in errors
    assert "deprecat" not in errors.lower()
    loaded = set(json.loads(seen.read_text()))
    assert {"wandb", "torchmetrics", "pytorch_lightning"} <= loaded
    unused = {
        *("scipy", "pandas", "sklearn", "mlflow", "wandb_workspaces", "optuna", "onnx", "onnxruntime", "lifelines"),
        *("torchmetrics.image", "torchmetrics.functional.text", "torchmetrics.detection", "wandb.sdk.launch.agent"),
    }
    assert not unused & loaded


@pytest.mark.slow  # it imports all of torchmetrics and of W&B Launch
def test_a_package_that_was_imported_in_part_is_whole_when_it_is_asked_for() -> None:
    assert python("-c", AFTER).stdout.split() == ["whole"]
