"""What a group of runs costs beside one run alone: python scripts/bench/bench_vectorized.py [OVERRIDES].

    python scripts/bench/bench_vectorized.py data=kuairand data.source=DIR
    python scripts/bench/bench_vectorized.py --models large --sizes 8 --steps 200

Each figure is the CPU time (user and system, one thread) of a sweep as a user starts it, because that is stable where
other work shares the machine. ``alone`` is one run: a sweep of three jobs minus a sweep of one, halved, and the rest
of the latter is the start. A group is a sweep of K jobs that differ in their seed, minus the start. It includes what
the sweep does for each job besides: composing it twice, its evaluation and its files.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ranker.runs.provenance import machine

ROOT = Path(__file__).resolve().parents[2]
GROUPABLE = (
    "logger=none",
    "trainer=cpu",
    "train.threads=1",
    "train.eval_every=0",
    "train.progressive=false",
    "train.checkpoint_every=0",
    "callbacks.early_signs.every=0",
    "callbacks.capsules=null",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py, for every run")
    parser.add_argument("--models", nargs="+", default=["small"], help="options of conf/model")
    parser.add_argument("--sizes", nargs="+", type=int, default=[16], help="replicas of a group")
    parser.add_argument("--orders", nargs="+", default=["shared"], choices=["shared", "own"])
    parser.add_argument("--steps", type=int, default=-1, help="of each run; -1: every row")
    parser.add_argument("--repeats", type=int, default=1, help="measurements, in turns; the median counts")
    options = parser.parse_args(arguments)
    print("| model | replicas | order | one run alone, CPU s | the group, CPU s | group / one run | runs for one |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in options.models:
        common = [*GROUPABLE, *options.overrides, f"model={model}", f"train.max_steps={options.steps}"]
        kinds = [(size, order) for size in options.sizes for order in options.orders]
        one, three = [], []
        groups: dict[tuple[int, str], list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):  # in turns, so that a busy minute does not fall on one of them
            one.append(cpu_seconds(common, seeds=1))
            three.append(cpu_seconds(common, seeds=3))
            for size, order in kinds:
                extra = [f"sweep.vectorize={size}", f"sweep.vectorize_order={order}"]
                groups[size, order].append(cpu_seconds([*common, *extra], seeds=size))
        alone = (statistics.median(three) - statistics.median(one)) / 2
        start = statistics.median(one) - alone
        for (size, order), seconds in groups.items():
            group = statistics.median(seconds) - start
            ratio = group / alone
            print(
                f"| {model} | {size} | {order} | {alone:.1f} | {group:.1f} | {ratio:.2f} | {size / ratio:.1f} |",
                flush=True,
            )
    print(f"\n{machine()}, one thread")


def cpu_seconds(overrides: Sequence[str], *, seeds: int) -> float:
    """CPU time of a sweep over so many seeds, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        words = [f"seed={','.join(map(str, range(seeds)))}", f"hydra.sweep.dir={folder}"]
        command = [sys.executable, str(ROOT / "train.py"), "-m", *overrides, *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
