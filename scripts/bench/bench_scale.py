"""Training at the paper's widths on a GPU: ``python scripts/bench/bench_scale.py --json results/bench_scale.json``.

Trains the paper's models on the synthetic stream through ``train.py``, in float32 and in bfloat16 (mixed), with naive
Adagrad and with Clippy, and reports for each run

- examples a second;
- model FLOP utilisation, MFU = F v / P: F the matrix FLOPs that one example's forward and backward pass need (counted,
  not estimated), v the examples a second, P the FLOPs a second of a large square matrix product in the same precision
  on the same device (measured, which is below the data sheet's number);
- the share of time spent waiting for data;
- whether the run was lost, and the AUC at its end: what bfloat16 does to stability.

Without a GPU, to see that it works: ``--device cpu --scale laptop --models small --steps 20``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from bench_report import Line, report
from ranker import config
from ranker.parts import make_net, open_log

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
COUNTED = 64  # examples of the batch whose FLOPs are counted; matrix products take FLOPs in proportion to it


def flops_per_example(model: str, scale: str) -> float:
    """FLOPs of matrix products in one example's forward and backward pass, F."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=[f"model={model}", f"scale={scale}"])
    log = open_log(cfg)
    net = make_net(cfg, log.schema)
    batch = log.read(0, COUNTED)
    with FlopCounterMode(display=False) as counter:
        net(batch).sum().backward()
    return counter.get_total_flops() / COUNTED


def matmul_speed(device: str, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOPs a second of the product of two large square matrices, P: the best of many."""
    n = 8192 if device == "cuda" else 512  # a CPU without instructions for bfloat16 takes seconds for more
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        _ = left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def train(model: str, optim: str, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    """Summary of one run; its status is ``failed`` where train.py did not end by itself."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"model={model}",
            f"optim={optim}",
            f"scale={given.scale}",
            f"trainer={'gpu' if given.device == 'cuda' else 'cpu'}",
            f"trainer.precision={precision}",
            f"train.max_steps={given.steps}",
            f"lr_mult={given.lr_mult:g}",
            "logger=none",
            "train.eval_every=0",
            "train.progressive=false",
            "train.checkpoint_every=0",
            f"hydra.run.dir={folder}",
            *given.overrides,
        ]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        path = Path(folder) / "summary.json"
        if done.returncode == 0 and path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        return {"status": "failed", "reason": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}


def lines_of(name: str, summary: dict[str, Any], flops: float, peak: float) -> list[Line]:
    """What one run showed.

    Args:
        name: what stands first in every line's name.
        summary: the run's ``summary.json``.
        flops: F, of one example.
        peak: P, FLOPs a second.
    """
    if summary["status"] == "failed":
        return [Line(f"{name}: {summary['reason']}", float("nan"), "failed", "to end", ok=False)]
    speed = summary["examples_per_second"]
    auc = next((v for k, v in summary["metrics"].items() if k.endswith("/auc") and v is not None), float("nan"))
    return [
        Line(f"{name}: speed", speed, "examples/s"),
        Line(f"{name}: model FLOP utilisation", flops * speed / peak, "ratio"),
        Line(f"{name}: waiting for data", summary["data_wait_fraction"], "ratio"),
        Line(f"{name}: AUC at the end", auc, f"AUC, {summary['status']}"),
    ]


def measure(given: argparse.Namespace, console: Console) -> list[Line]:
    """Every combination asked for."""
    peaks = {name: matmul_speed(given.device, PRECISIONS[name]) for name in given.precisions}
    lines = [Line(f"matrix product, {name}", peak / 1e12, "TFLOP/s") for name, peak in peaks.items()]
    for model in given.models:
        flops = flops_per_example(model, given.scale)
        lines.append(Line(f"{model}: one example, forward and backward", flops / 1e6, "MFLOP"))
        for optim in given.optims:
            for precision in given.precisions:
                name = f"{model}, {optim}, {precision}"
                console.print(f"{name} ...")
                lines += lines_of(name, train(model, optim, precision, given), flops, peaks[precision])
    return lines


def machine(device: str) -> str:
    """Device and version that the figures belong to."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and returns 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="further overrides of every run, such as scale.batch_size=16384")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", choices=["paper", "laptop"], default="paper")
    parser.add_argument("--models", nargs="+", default=["small", "large", "large_dcn"])
    parser.add_argument("--optims", nargs="+", default=["adagrad", "clippy"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--lr-mult", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    given = parser.parse_intermixed_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU here; --device cpu --scale laptop shows that the script works", file=sys.stderr)
        return 2
    config.register()
    console = Console(stderr=True)
    lines = measure(given, console)
    where = machine(given.device)
    return report([Line(f"made on {where}", 1, "machine"), *lines], given.json, title=where)


if __name__ == "__main__":
    sys.exit(main())
