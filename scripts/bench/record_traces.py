"""Records training runs for the detector's benchmark: ``python scripts/bench/record_traces.py --out DIR OVERRIDES``.

Overrides are those of train.py. Values with commas make a grid, as in a multirun: ``model=small,large seed=0,1``.
``--plan FILE`` reads one grid a line. Each run becomes one file, and a file that exists is not recorded again.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ranker.hydra_private import expand, parse
from recorded_runs import write
from trace_recorder import record

# Settings of place and machine are no part of a run's name.
UNNAMED = ("data.source", "data.cache_dir", "train.threads")


def runs(
    grids: Sequence[Sequence[str]], common: Sequence[str], kuairand: Path | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Name of the file and overrides of each run, each run once."""
    seen = set()
    for grid in grids:
        source = [f"data.source={kuairand}"] if kuairand and "data=kuairand" in (*grid, *common) else []
        for overrides in expand(parse([*grid, *common, *source])):
            name = name_of(overrides)
            if name not in seen:
                seen.add(name)
                yield name, overrides


def name_of(overrides: Sequence[str]) -> str:
    """The values of a run, and the last word of the key where the value alone would not tell: ``small_seed1``."""
    parts = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith(UNNAMED):
            continue
        plain = key in ("data", "model", "optim", "mitigation")
        parts.append(value if plain else f"{_SHORT.get(key, key.split('.')[-1])}{value}")
    return re.sub(r"[^\w.-]+", "-", "_".join(parts))


_SHORT = {
    "data.base_lr.laptop": "lr",
    "scale.batch_size": "batch",
    "train.warmup_steps": "warm",
    "optim.initial_accumulator_value": "G",
    "data.log.train_rows": "rows",
}


def main() -> int:
    """Records what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--plan", type=Path, help="file of grids, one a line; # starts a comment")
    parser.add_argument("--kuairand", type=Path, help="data.source of the runs with data=kuairand")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this many minutes")
    parser.add_argument("--no-sharpness", action="store_true", help="leave out the sharpness, the costliest sign")
    parser.add_argument("--rare-every", type=int, default=20, help="steps between two task cosines and sharpnesses")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between two evaluations on the hold-out")
    args, overrides = parser.parse_known_args()
    grids: list[list[str]] = [[]]
    if args.plan:
        lines = (line.partition("#")[0].split() for line in args.plan.read_text(encoding="utf-8").splitlines())
        grids = [line for line in lines if line]
    planned = list(runs(grids, overrides, args.kuairand))
    missing = [(name, run) for name, run in planned if not (args.out / f"{name}.npz").is_file()]
    print(f"{len(planned)} runs, {len(missing)} to record", flush=True)
    start = time.monotonic()
    for name, run in missing:
        began = time.monotonic()
        if began - start > 60 * args.minutes:
            break
        recorded = record(
            [*run, "train.threads=1"],
            eval_every=args.eval_every,
            rare_every=args.rare_every,
            sharpness=not args.no_sharpness,
        )
        write(recorded, args.out / f"{name}.npz")
        auc = recorded.arrays["eval_auc"][-1]
        print(
            f"{name}: {recorded.steps} steps, {time.monotonic() - began:.0f} s, loss at most "
            f"{recorded.loss_N[100:].max(initial=0):.3g}, AUC {auc[0]:.3f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
