"""What the framework adds to a step: python scripts/bench/bench_step.py [--json FILE] [--models small large].

A bare torch loop (forward pass, loss, backward pass, optimizer) over batches that lie in memory, and ``train.py`` over
the same batches of the synthetic stream with everything on that is on by default: reading, metrics, divergence watch,
snapshots, early signs, checkpoints and the logger. Same net, loss, optimizer, learning rate and threads. Each in a
process of its own, in turns; a row is the median over rounds of the ratio within a round. Evaluations on the hold-out
are left out: how often to evaluate is the user's choice. Run it on an idle machine.

``--bare OVERRIDES`` is the bare loop alone; it prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench_report import Line, limited, report

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"small": "Small", "large": "Large", "large_dcn": "Large+DCN", "moe": "MMoE", "ple": "PLE"}
BATCHES = (64, 256, 1024, 4096)
# Ratios: of Small, and of the others.
GOALS = {256: (1.15, 1.05), 1024: (1.10, 1.03)}
WARM = 20  # steps that are not measured in the bare loop
HELD = 64  # batches in memory, used in turns


def bare(overrides: Sequence[str]) -> dict[str, float]:
    """Milliseconds per step of the bare loop, and its number of steps."""
    import torch
    from hydra import compose, initialize_config_dir

    from ranker import config
    from ranker.build import build_module, open_log
    from ranker.data.datamodule import RankingDataModule

    config.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=list(overrides))
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.train.threads or torch.get_num_threads())
    log = open_log(cfg)
    module = build_module(cfg, log.schema)
    data = RankingDataModule(
        log,
        batch_size=cfg.scale.batch_size,
        window=cfg.data.window,
        seed=cfg.seed,
        num_workers=cfg.data.num_workers,
        dense_statistics=cfg.data.dense_statistics,
    )
    module.start_heads(data)
    batches = [batch for _, batch in zip(range(HELD), data.train_dataloader(), strict=False)]
    optimizer = module.make_optimizer()
    module.net.train()
    started = 0.0
    for step in range(WARM + cfg.train.max_steps):
        if step == WARM:
            started = time.perf_counter()
        batch = batches[step % len(batches)]
        rate = module.lr * min(1.0, (step + 1) / max(1, cfg.train.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        module.loss(module.net(batch), batch.labels_BT, batch.mask_BT).total.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    return {"ms": 1e3 * seconds / cfg.train.max_steps, "steps": cfg.train.max_steps}


def run(command: Sequence[str], *, threads: int) -> str:
    """What a process prints.

    Raises:
        RuntimeError: it failed; the last line that it wrote says why.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"{' '.join(command)} failed: {said[-1]}")
    return done.stdout


def bare_ms(overrides: Sequence[str], threads: int) -> float:
    """Milliseconds per step of the bare loop, in a process of its own."""
    out = run([sys.executable, __file__, "--bare", *overrides], threads=threads)
    return float(json.loads(out.splitlines()[-1])["ms"])


def train_ms(overrides: Sequence[str], threads: int, batch: int) -> float:
    """Milliseconds per step of train.py, without its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "train.py", *overrides, f"hydra.run.dir={folder}"], threads=threads)
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    return 1e3 * batch / float(summary["examples_per_second"])


def measure(model: str, batch: int, given: argparse.Namespace) -> list[Line]:
    """The rows of one model and batch size."""
    steps = max(60, min(given.steps, given.rows // batch))
    overrides = [
        f"model={model}",
        f"scale.batch_size={batch}",
        f"data.log.train_rows={steps * batch + 50_000}",
        f"train.max_steps={steps}",
        f"train.threads={given.threads}",
        "train.eval_every=0",
        *given.overrides,
    ]
    bares, trained = [], []
    for _ in range(given.rounds):
        bares.append(bare_ms(overrides, given.threads))
        trained.append(train_ms(overrides, given.threads, batch))
        print(f"{model}, {batch}: bare {bares[-1]:.2f} ms, train.py {trained[-1]:.2f} ms", file=sys.stderr, flush=True)
    ratio = statistics.median(t / b for t, b in zip(trained, bares, strict=True))
    name = f"{LABELS[model]}, {batch} rows"
    goal = GOALS.get(batch, (0.0, 0.0))[model != "small"]
    last = limited(f"{name}: ratio", ratio, goal) if goal else Line(f"{name}: ratio", ratio, "ratio")
    return [
        Line(f"{name}: bare loop", statistics.median(bares), "ms"),
        Line(f"{name}: train.py", statistics.median(trained), "ms"),
        last,
    ]


def main() -> int:
    """Measures and reports; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py, for both")
    parser.add_argument("--bare", action="store_true", help="the bare loop alone")
    parser.add_argument("--models", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--steps", type=int, default=600, help="of a run, at most")
    parser.add_argument("--rows", type=int, default=600_000, help="of a run, at most, but at least 60 steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the rows go")
    given = parser.parse_intermixed_args()
    if given.bare:
        print(json.dumps(bare(given.overrides)))
        return 0
    lines = [line for model in given.models for batch in given.batches for line in measure(model, batch, given)]
    return report(lines, given.json, title="train.py beside a bare loop on the same batches")


if __name__ == "__main__":
    sys.exit(main())
