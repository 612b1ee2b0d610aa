"""The benchmark at the paper's widths, as far as it can be seen without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support import ROOT

SCRIPT = ROOT / "scripts" / "bench" / "bench_scale.py"


@pytest.fixture
def bench(load_script: Callable[[str], ModuleType]) -> ModuleType:
    module = load_script("bench_scale")
    module.config.register()
    return module


def test_flops_are_those_of_the_linear_layers_by_hand(bench: ModuleType) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=["model=small"])
    net = bench.make_net(cfg, bench.open_log(cfg).schema)
    weights = sum(p.numel() for m in net.modules() if isinstance(m, torch.nn.Linear) for p in [m.weight])
    # Forward, gradient of the weights, gradient of the input: a multiplication and an addition a weight each.
    assert bench.flops_per_example("small", "laptop") == pytest.approx(6 * weights, rel=0.02)


def test_utilisation_is_flops_times_speed_over_the_peak(bench: ModuleType) -> None:
    summary = {"status": "completed", "examples_per_second": 50.0, "data_wait_fraction": 0.0, "metrics": {"c/auc": 0.7}}
    lines = {line.name: line for line in bench.lines_of("x", summary, flops=4.0, peak=1000.0)}
    assert lines["x: model FLOP utilisation"].value == pytest.approx(0.2)
    assert lines["x: AUC at the end"].value == 0.7


def test_a_run_that_failed_is_a_line_that_is_not_ok(bench: ModuleType) -> None:
    (line,) = bench.lines_of("x", {"status": "failed", "reason": "out of memory"}, flops=1.0, peak=1.0)
    assert line.ok is False
    assert "out of memory" in line.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cuda"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: no GPU here; --device cpu --scale laptop shows that the script works"]


@pytest.mark.slow
def test_it_measures_both_precisions_through_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--scale", "laptop", "--models", "small"]
    command += ["--optims", "clippy", "--steps", "12", "--json", str(out), "data.log.train_rows=20480"]
    subprocess.run(command, check=True, capture_output=True)
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    for precision in ("32-true", "bf16-mixed"):
        assert rows[f"small, clippy, {precision}: speed"]["value"] > 0
        assert rows[f"small, clippy, {precision}: AUC at the end"]["unit"] == "AUC, completed"
