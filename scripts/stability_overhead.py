"""What the stability callbacks cost beside a bare training step: ``python scripts/stability_overhead.py [--rounds N]``.

Large at laptop scale in the real trainer, with the callbacks of conf/callbacks/default.yaml at their default settings.
They are switched every 10 steps of one run, in an order drawn anew each round, so that what else the machine does hits
all alike. What comes every so many steps is timed for itself and counts by how often it comes. Medians decide; beside
them stands the same from the lowest tenth of each sort of step, since on a shared machine steps take twice as long for
minutes. "sharpness, off" does nothing: how far it is from 0 is how far to trust the rest.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from pytorch_lightning.callbacks import Callback

from ranker import config
from ranker.build import build
from ranker.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 10
SHARES = {1: 0.9, 10: 0.04, 20: 0.04, 50: 0.01, 100: 0.005, 200: 0.005}  # of steps, by their longest period
WARM_UP = 3  # blocks
TARGET = 0.03
# Snapshots and capsules ask the watch, so that they are measured together with it.
CONFIGURATIONS = {
    "divergence": ("DivergenceWatch",),
    "divergence, snapshots and rollback": ("DivergenceWatch", "SnapshotRing", "Rollback"),
    "divergence and capsules": ("DivergenceWatch", "Capsules"),
    "early signs": ("EarlySigns",),
    "sharpness, off": ("SharpnessProbe",),
}


class Switchboard(Callback):
    """Lets callbacks take part in turns, and takes the time from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.blocks: list[tuple[str, list[Callback]]] = []
        self._ended = 0.0
        self._name = self._before = ""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begins a block where one is due."""
        step = trainer.global_step
        if step % BLOCK == 0:
            self._name, chosen = self.blocks[min(step // BLOCK, len(self.blocks) - 1)]
            trainer.callbacks[:] = chosen  # type: ignore[attr-defined]
        if step:  # the one that has just ended, and whose block that was
            period = max(p for p in SHARES if step % p == 0)
            self.seconds[self._before][period].append(time.perf_counter() - self._ended)
        self._before = self._name
        self._ended = time.perf_counter()


def measure(rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of steps by configuration and period; ``bare`` has none of the callbacks and ``all`` has them all."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        names = ["bare", *CONFIGURATIONS, "all"]
        steps = (rounds * len(names) + WARM_UP) * BLOCK
        overrides = ["model=large", "optim=clippy", "trainer=cpu", "logger=csv", "train.eval_every=0"]
        overrides += [
            "train.progressive=false",
            "train.checkpoint_every=0",
            f"data.log.train_rows={1024 * (steps + 1)}",
        ]
        cfg = compose("config", overrides=overrides)
    with tempfile.TemporaryDirectory() as folder:
        run = build(cfg, RunFolder(folder), None)
        every: list[Callback] = run.trainer.callbacks  # type: ignore[attr-defined]
        watched = {name for group in CONFIGURATIONS.values() for name in group} | {"TrainingProgress"}
        bare = [c for c in every if type(c).__name__ not in watched]
        board = Switchboard()
        chosen = {"bare": bare, "all": list(every)}
        for name, types in CONFIGURATIONS.items():
            chosen[name] = [c for c in every if c in bare or type(c).__name__ in types]
        draw = random.Random(0)
        order = ["warm-up"] * WARM_UP + [name for _ in range(rounds) for name in draw.sample(names, len(names))]
        board.blocks = [(name, [board, *chosen.get(name, chosen["all"])]) for name in order]
        every.insert(0, board)
        run.trainer.fit(run.module, datamodule=run.datamodule)
    return {name: board.seconds[name] for name in names}


def _a_step(by_period: dict[int, list[float]], share_below: float) -> float:
    """Seconds, each sort of step by the number that this share of them lies below."""

    def of(period: int) -> float:
        seconds = sorted(by_period[period] or by_period[1])
        return seconds[int(share_below * len(seconds))]

    return sum(share * of(period) for period, share in SHARES.items())


def rows(rounds: int) -> list[dict[str, Any]]:
    """The table: name, value, unit, target, ok."""
    taken = measure(rounds)
    found: list[dict[str, Any]] = []
    for statistic, share_below in (("median", 0.5), ("lowest tenth", 0.1)):
        seconds = {name: _a_step(by_period, share_below) for name, by_period in taken.items()}
        bare = seconds.pop("bare")
        found.append({"name": f"bare step of Large, {statistic}", "value": 1e3 * bare, "unit": "ms"})
        for name, value in seconds.items():
            found.append({"name": f"overhead, {statistic}: {name}", "value": 100 * (value / bare - 1), "unit": "%"})
    for row in found:
        judged = row["name"] == "overhead, median: all"
        row |= {
            "target": f"at most {TARGET:.0%}" if judged else "",
            "ok": row["value"] <= 100 * TARGET if judged else None,
        }
    return found


def main() -> None:
    """Measures and prints; exit status 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20, help="blocks of 10 steps of each configuration")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    config.register()
    table = rows(options.rounds)
    for row in table:
        print(f"{row['name']:<60} {row['value']:8.2f} {row['unit']:<3} {row['target']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(int(any(row["ok"] is False for row in table)))


if __name__ == "__main__":
    main()
