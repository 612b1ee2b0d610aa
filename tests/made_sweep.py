"""A sweep that was never trained: run folders with plausible curves, lost runs and useless ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

OPTIMS = ("adagrad", "gc", "agc", "lamb", "clippy")
RATES = (0.25, 1.0, 4.0, 16.0)
EDGE = {"adagrad": 0.9, "gc": 8.0, "agc": 8.0, "lamb": 5.0, "clippy": 40.0}  # lost above it


def write_sweep(
    folder: Path,
    *,
    optims: Sequence[str] = OPTIMS,
    rates: Sequence[float] = RATES,
    seeds: int = 3,
    steps: int = 800,
    settings: bool = False,
) -> Path:
    """Writes one folder a run: summary.json, metrics.csv and config.yaml.

    Args:
        folder: where they go.
        optims: names of optimizers.
        rates: learning rates.
        seeds: runs of each.
        steps: of a run.
        settings: each run of Clippy has thresholds of its own, as in a search.
    """
    draw = random.Random(0)
    for optim in optims:
        for rate in rates:
            for seed in range(seeds):
                thresholds = (10 ** draw.uniform(-3, 0), 10 ** draw.uniform(-4, -1)) if settings else (0.1, 0.01)
                write_one(folder / f"{optim}_x{rate:g}_seed{seed}", optim, rate, seed, steps, thresholds, draw)
    return folder


def write_one(
    folder: Path, optim: str, rate: float, seed: int, steps: int, thresholds: tuple[float, float], draw: random.Random
) -> None:
    folder.mkdir(parents=True)
    lost = rate > EDGE.get(optim, 4.0) * draw.uniform(0.7, 1.4)
    useless = not lost and optim == "gc" and rate >= 4 and seed == 0
    end = int(steps * draw.uniform(0.3, 0.8)) if lost else steps
    best = 0.745 - 0.012 * abs(math.log10(rate * 1.5)) + draw.gauss(0, 0.0015)
    lines = ["step,train/loss,lr,train/click/loss,train/click/auc,val/click/auc,val/watch/rmse"]
    for step in range(10, end + 1, 10):
        auc = 0.5 if useless else best - (best - 0.5) * math.exp(-step / 150) + draw.gauss(0, 0.002)
        loss = 2.2 + 2.5 * math.exp(-step / 120) + abs(draw.gauss(0, 0.05))
        if lost and step > end - 60:
            loss *= 10 ** draw.uniform(0, 3.5)
            auc = 0.5
        value = f"{auc:.5f},{1.3 - auc / 3:.4f}" if step % 50 == 0 else ","
        lines.append(f"{step},{'nan' if lost and step == end else f'{loss:.5f}'},0.1,{loss / 3:.5f},{auc:.5f},{value}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    auc = 0.5 if useless or lost else best
    metrics = {"test/click/auc": auc, "test/click/ne": 0.999 if useless else 0.85, "test/watch/rmse": 1.3 - auc / 3}
    summary = {
        "status": "diverged" if lost else "completed",
        "reason": f"loss of click rose 40 times at step {end - 60} and did not come back" if lost else None,
        "model": "small",
        "optim": optim,
        "data": "kuairand",
        "scale": "laptop",
        "lr": 0.52 * rate,
        "lr_mult": rate,
        "seed": seed,
        "steps": end,
        "examples_per_second": 20_000.0 + 1000 * seed,
        "data_wait_fraction": 0.01,
        "metrics": metrics,
        "divergence": {"micro": 0, "full": lost, "first_step": end - 60 if lost else None},
        "parameters": {"embedding": 10, "dense": 20},
        "commit": "0123456789abcdef",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {"seed": seed, "optim": {"name": optim, "lambda_rel": thresholds[0], "lambda_abs": thresholds[1]}}
    (folder / "config.yaml").write_text(json.dumps(config))
