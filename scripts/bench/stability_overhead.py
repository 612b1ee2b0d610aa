"""Cost of the stability callbacks beside a bare training step: ``python scripts/bench/stability_overhead.py``.

Large at laptop scale in the real trainer, with the callbacks of conf/callbacks/default.yaml at their default settings.
They are switched every 20 steps of one run, in an order drawn anew each round, and every such block lies between two
bare ones, with which alone it is compared: a shared machine gets faster and slower by half within minutes, neighbouring
seconds are alike. What comes every so many steps is compared with the ordinary steps of its own block, and counts by
how often it comes. Medians over blocks, with a bootstrap interval. "sharpness, off" does nothing: how far it is from 0
is how far to trust the rest.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from pytorch_lightning.callbacks import Callback

from ranker import config
from ranker.build import build
from ranker.runs.run_folder import RunFolder
from ranker.training.stability_callback import Stability

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 20  # steps; every block has a step of the early signs
SHARES = {1: 0.9, 10: 0.04, 20: 0.04, 50: 0.01, 100: 0.005, 200: 0.005}  # of steps, by their longest period
WARM_UP = 3  # blocks
BARE, ALL = "bare", "all"
ALL_A_ROUND = 4  # blocks with everything in a round, beside one of each part: the target is about them
RESAMPLED = 2000
TARGET = 0.03
# Parts of the stability callback, or the type of another callback. The parts act on the detector's verdict, so they are
# measured together with it.
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "divergence": ("divergence",),
    "divergence, snapshots and rollback": ("divergence", "snapshots", "rollback"),
    "divergence and capsules": ("divergence", "capsules"),
    "early signs": ("EarlySigns",),
    "sharpness, off": ("SharpnessProbe",),
}


@dataclass
class Block:
    """Seconds of the steps of one configuration in a row: ordinary ones, and by period those that come more rarely."""

    name: str
    ordinary: list[float] = field(default_factory=list)
    rare: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, step: int, seconds: float) -> None:
        """Takes in a step."""
        period = max(p for p in SHARES if step % p == 0)
        (self.ordinary if period == 1 else self.rare[period]).append(seconds)

    @property
    def typical(self) -> float:
        """Seconds of an ordinary step."""
        return statistics.median(self.ordinary)


class Switchboard(Callback):
    """Lets callbacks take part in turns, and takes the time from the end of one step to that of the next."""

    def __init__(self, order: Sequence[str], chosen: Mapping[str, list[Callback]]) -> None:
        self.blocks: list[Block] = []
        self._order, self._chosen = order, chosen
        self._ended = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Ends a step, and begins a block where one is due."""
        step, now = trainer.global_step, time.perf_counter()
        if step:
            self.blocks[-1].add(step, now - self._ended)
        if step % BLOCK == 0:
            name = self._order[min(step // BLOCK, len(self._order) - 1)]
            self.blocks.append(Block(name))
            trainer.callbacks[:] = [self, *self._chosen[name]]  # type: ignore[attr-defined]
        self._ended = time.perf_counter()


def measure(rounds: int) -> list[Block]:
    """Trains, and returns the blocks after the warm-up: those of even numbers are bare."""
    names, draw = [*CONFIGURATIONS, *[ALL] * ALL_A_ROUND], random.Random(0)
    order = [ALL] * WARM_UP
    for _ in range(rounds):
        order += [x for name in draw.sample(names, len(names)) for x in (BARE, name)]
    order.append(BARE)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        overrides = ["model=large", "optim=clippy", "trainer=cpu", "logger=csv", "train.eval_every=0"]
        overrides += [
            "train.progressive=false",
            "train.checkpoint_every=0",
            f"data.log.train_rows={1024 * (len(order) * BLOCK + 1)}",
        ]
        cfg = compose("config", overrides=overrides)
    with tempfile.TemporaryDirectory() as folder:
        run = build(cfg, RunFolder(folder), None)
        every: list[Callback] = run.trainer.callbacks  # type: ignore[attr-defined]
        observing = {"Stability", "EarlySigns", "SharpnessProbe", "TrainingProgress"}
        bare = [c for c in every if type(c).__name__ not in observing]
        chosen = {BARE: bare, ALL: list(every)}
        for name, parts in CONFIGURATIONS.items():
            part: list[Callback] = [_only(run.stability, parts)] if "divergence" in parts else []
            chosen[name] = [c for c in every if c in bare or type(c).__name__ in parts] + part
        board = Switchboard(order, chosen)
        every.insert(0, board)
        run.trainer.fit(run.module, datamodule=run.datamodule)
    return board.blocks[WARM_UP : len(order)]


def _only(stability: Stability, parts: Sequence[str]) -> Stability:
    """The callback with some of its parts, which it shares with the whole one."""
    part = copy.copy(stability)
    for name in ("snapshots", "capsules", "rollback"):
        if name not in parts:
            setattr(part, name, None)
    return part


@dataclass
class Samples:
    """What one configuration showed, each as a share of an ordinary step: beside bare blocks, and of its rare steps."""

    beside_bare: list[float] = field(default_factory=list)
    rare: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def drawn(self, draw: random.Random) -> Samples:
        """As many of each, drawn with replacement."""
        rare = {period: draw.choices(values, k=len(values)) for period, values in self.rare.items()}
        return Samples(draw.choices(self.beside_bare, k=len(self.beside_bare)), rare)


def samples_of(blocks: Sequence[Block]) -> dict[str, Samples]:
    """By configuration: every block beside the two bare ones around it, every rare step beside its own block."""
    found: dict[str, Samples] = defaultdict(Samples)
    for block in blocks:
        for period, seconds in block.rare.items():
            found[block.name].rare[period] += [taken / block.typical - 1 for taken in seconds]
    for before, block, after in zip(blocks[0::2], blocks[1::2], blocks[2::2], strict=False):
        bare = (before.typical + after.typical) / 2
        found[block.name].beside_bare.append(block.typical / bare - 1)
    return dict(found)


def overhead(samples: Samples, bare: Samples) -> float:
    """What a step costs more than a bare one, as a share of it; a rare step that was never seen counts as ordinary."""
    cost = statistics.median(samples.beside_bare)
    for period, share in SHARES.items():
        if period > 1:
            with_them, without = samples.rare.get(period), bare.rare.get(period)
            cost += share * (statistics.median(with_them or [0.0]) - statistics.median(without or [0.0]))
    return cost


def rows(rounds: int) -> list[dict[str, Any]]:
    """The table: name, value, unit, target, ok."""
    blocks = measure(rounds)
    samples = samples_of(blocks)
    step_ms = 1e3 * statistics.median(block.typical for block in blocks if block.name == BARE)
    found: list[dict[str, Any]] = [_row("bare step of Large", step_ms, "ms")]
    bare, draw = samples.pop(BARE), random.Random(0)
    bare.beside_bare = [0.0]  # by definition
    for name in (*CONFIGURATIONS, ALL):
        value = overhead(samples[name], bare)
        found.append(_row(f"overhead: {name}", 100 * value, "%", TARGET if name == ALL else None))
        resampled = sorted(overhead(samples[name].drawn(draw), bare.drawn(draw)) for _ in range(RESAMPLED))
        for share in (0.05, 0.95):
            found.append(
                _row(f"overhead: {name}, {share:.0%} of resamples below", 100 * resampled[int(share * RESAMPLED)], "%")
            )
    return found


def _row(name: str, value: float, unit: str, target: float | None = None) -> dict[str, Any]:
    if target is None:
        return {"name": name, "value": value, "unit": unit, "target": "", "ok": None}
    return {"name": name, "value": value, "unit": unit, "target": f"at most {target:.0%}", "ok": value <= 100 * target}


def main() -> None:
    """Measures and prints; exit status 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--rounds", type=int, default=12, help="of 360 steps: four blocks of everything, one of each part"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    config.register()
    table = rows(options.rounds)
    for row in table:
        print(f"{row['name']:<72} {row['value']:8.2f} {row['unit']:<3} {row['target']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(int(any(row["ok"] is False for row in table)))


if __name__ == "__main__":
    main()
