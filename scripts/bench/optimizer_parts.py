"""What two parts of an optimizer step are worth: python scripts/bench/optimizer_parts.py [OVERRIDES].

    python scripts/bench/optimizer_parts.py model=small scale.batch_size=256

A bare loop (forward pass, loss, backward pass, optimizer) over batches that lie in memory, with the plan of the last
step (``optim/native/plan.py``) and the statistics that C writes on and off, in blocks of 20 steps in random order. CPU
time of the one thread, medians over blocks.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence

from bench_step import net_and_batches
from optim.native.backend import NATIVE
from ranker.runs.provenance import machine

STEPS = 20  # of a block; two more before it are not measured
KINDS = {"neither": (False, False), "the plan": (True, False), "statistics in C": (False, True), "both": (True, True)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py")
    parser.add_argument("--blocks", type=int, default=60, help="of each kind")
    options = parser.parse_args(arguments)
    words = ["data.log.train_rows=100000", "train.threads=1", *options.overrides]
    module, _, batches = net_and_batches(words)
    optimizer = module.make_optimizer()
    in_c, taken = type(NATIVE).apply_and_record, 0

    def block(steps: int, *, plan: bool, statistics_in_c: bool) -> tuple[float, float]:
        """CPU milliseconds of a training step, and of the optimizer's part of it."""
        nonlocal taken
        type(NATIVE).apply_and_record = in_c if statistics_in_c else lambda *_: False  # type: ignore[method-assign]
        whole, part = time.thread_time(), 0.0
        for _ in range(steps):
            batch = batches[taken % len(batches)]
            taken += 1
            optimizer.zero_grad()
            module.loss(module.net(batch), batch.labels_BT, batch.mask_BT).total.backward()
            if not plan:
                optimizer.__dict__.pop("_plan", None)
            begun = time.thread_time()
            optimizer.step()
            part += time.thread_time() - begun
        return 1e3 * (time.thread_time() - whole) / steps, 1e3 * part / steps

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    for _ in range(options.blocks):
        for name in random.sample(list(KINDS), len(KINDS)):
            plan, statistics_in_c = KINDS[name]
            block(2, plan=plan, statistics_in_c=statistics_in_c)
            found[name].append(block(STEPS, plan=plan, statistics_in_c=statistics_in_c))
    print("| what is on | a training step, ms | optimizer step, ms | training step / both |\n|---|---:|---:|---:|")
    for name, pairs in found.items():
        ratio = statistics.median(one[0] / two[0] for one, two in zip(pairs, found["both"], strict=True))
        wholes, parts = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| {name} | {wholes:.2f} | {parts:.2f} | {ratio:.2f} |")
    print(f"\n{machine()}, one thread")


if __name__ == "__main__":
    main()
