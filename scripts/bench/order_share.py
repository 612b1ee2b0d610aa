"""How much of the spread over seeds comes from the order of the rows: python scripts/bench/order_share.py [OVERRIDES].

    python scripts/bench/order_share.py data=kuairand data.source=DIR --json FILE

A seed decides two things, the initial weights and the order of the rows inside each window. Here they are varied apart:
every order with every set of weights, W runs of one order as a group (docs/sweeps.md). Of a metric y

    y_ow = mean + order_o + weights_w + rest_ow

and the variances of the three are estimated by the mean squares of a two-way layout,
V_order = (MS_order - MS_rest) / W. A run whose seed decides both has V_order + V_weights + V_rest. Runs that share an
order miss V_order.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from bench_vectorized import GROUPABLE
from ranker import config
from ranker.vectorized.group import train
from ranker.vectorized.replica import Job

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("auc", "ne", "rmse")  # of each task, where it has them


def shares(y_OW: npt.NDArray[np.float64]) -> dict[str, float]:
    """The parts of the variance of values [orders, weights], and the standard deviation where a seed decides both.

    Raises:
        ValueError: fewer than two orders or weights.
    """
    orders, weights = y_OW.shape
    if min(orders, weights) < 2:
        raise ValueError(f"two orders and two sets of weights are needed, got {orders} and {weights}")
    by_order, by_weights = y_OW.mean(1), y_OW.mean(0)
    rest = y_OW - by_order[:, None] - by_weights[None] + y_OW.mean()
    ms_rest = float((rest**2).sum()) / ((orders - 1) * (weights - 1))
    v_order = max(0.0, float(by_order.var(ddof=1)) - ms_rest / weights)
    v_weights = max(0.0, float(by_weights.var(ddof=1)) - ms_rest / orders)
    total = v_order + v_weights + ms_rest
    known = total or math.nan  # without any spread there are no shares
    return {
        "order": v_order / known,
        "weights": v_weights / known,
        "rest": ms_rest / known,
        "standard_deviation": math.sqrt(total),
    }


def composed(overrides: Sequence[str], seed: int) -> DictConfig:
    """The configuration of a run."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        made = compose("config", overrides=[*GROUPABLE, *overrides, f"seed={seed}"])
    cfg = OmegaConf.create(OmegaConf.to_container(made, resolve=True))
    assert isinstance(cfg, DictConfig)
    config.check(cfg)
    return cfg


def run_order(order: int, configs: Sequence[DictConfig], folder: Path) -> list[dict[str, Any]]:
    """The summaries of the runs of one order, by weights."""
    jobs = [Job(number, cfg, folder / f"order{order}_weights{number}") for number, cfg in enumerate(configs)]
    for job in jobs:
        job.folder.mkdir(parents=True)
    found: dict[int, dict[str, Any]] = {}
    train(
        jobs,
        order="shared",
        order_seed=order,
        ended=lambda job, summary: found.update({job.number: summary}),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return [found[number] for number in range(len(jobs))]


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """In Markdown."""
    made = [
        "| metric | standard deviation over seeds | order | weights | both together |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        parts = " | ".join(f"{100 * row[part]:.0f} %" for part in ("order", "weights", "rest"))
        made.append(f"| {name} | {row['standard_deviation']:.2g} | {parts} |")
    middle = [
        f"{100 * statistics.median(row[part] for row in rows.values()):.0f} %" for part in ("order", "weights", "rest")
    ]
    made.append(f"| median | | {' | '.join(middle)} |")
    return "\n".join(made)


def main() -> int:
    """Runs the study and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py, for every run")
    parser.add_argument("--orders", type=int, default=8)
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where the values of all runs and the shares go")
    given = parser.parse_intermixed_args()
    config.register()
    configs = [composed(given.overrides, seed) for seed in range(given.weights)]
    started, summaries = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for order in range(given.orders):
            summaries.append(run_order(order, configs, Path(folder)))
            print(f"order {order} after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    lost = sum(summary["status"] != "completed" for row in summaries for summary in row)
    if lost:
        print(f"{lost} runs were lost; choose a lower rate", file=sys.stderr)
        return 1
    names = [
        name for name in summaries[0][0]["metrics"] if name.startswith("test/") and name.rsplit("/", 1)[1] in METRICS
    ]
    values = {name: [[s["metrics"][name] for s in row] for row in summaries] for name in names}
    rows = {name: shares(np.array(of)) for name, of in values.items()}
    if given.json:
        given.json.write_text(json.dumps({"shares": rows, "values": values}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
