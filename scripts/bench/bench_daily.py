"""Daily training under load: days of many rows in one call, killed on the way, beside a call that nothing disturbs.

    python scripts/bench/bench_daily.py --days 30 --rows 1000000 --kills 10 --json results/bench_daily.json

Writes a log, one Parquet file a day. One call of scripts/daily.py trains on it undisturbed. Another one, into another
folder, is killed with SIGKILL at times spread over the days, with all its processes or (every third time) alone, and is
started again each time. Both must end with the same weights, bit for bit, for each day that is still kept. Memory (the
anonymous memory of all processes of the call, sampled) must not grow with the days. The folders stay, and a second
call with the same --out goes on. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from ranker.atomic import write_text
from ranker.runs.checkpoint_files import by_step
from ranker.runs.provenance import machine

ROOT = Path(__file__).parents[2]
DAY_MS = 86_400_000
FIRST_DAY = 20_454  # 2026-01-01
USERS, ITEMS = 5_000, 2_000
SCHEMA = f"""
name: load
time_column: ts
dense:
- {{name: price}}
- {{name: age, transform: log1p}}
- {{name: clicks, transform: log1p}}
categorical:
- {{name: user, num_embeddings: {USERS}, embedding_dim: 8}}
- {{name: item, hash_buckets: {ITEMS}, embedding_dim: 8}}
- {{name: shop, vocabulary: [a, b, c, d], embedding_dim: 4}}
tasks:
- {{name: click}}
- {{name: watch, type: regression, transform: log1p}}
"""
POLL_SECONDS = 0.25
GROWTH = 1.15  # memory of the last third of the days beside the first third


def write_day(path: Path, day: int, rows: int) -> None:
    """Writes a day whose labels depend on its features."""
    draw = np.random.default_rng(day)
    price, user = draw.random(rows, dtype=np.float32), draw.integers(0, USERS, rows)
    item = (draw.random(rows) ** 3 * ITEMS).astype(np.int64)
    chance = 0.05 + 0.6 * price + 0.2 * (user % 2) + 0.1 * (item % 3 == 0)
    frame = pl.DataFrame(
        {
            "ts": (FIRST_DAY + day) * DAY_MS + np.arange(rows, dtype=np.int64) * DAY_MS // rows,
            "price": price,
            "age": draw.lognormal(3, 1, rows).astype(np.float32),
            "clicks": draw.poisson(2, rows).astype(np.float32),
            "user": user,
            "item": item,
            "shop": pl.Series(draw.integers(0, 4, rows)).replace_strict({0: "a", 1: "b", 2: "c", 3: "d"}),
            "click": (draw.random(rows) < chance).astype(np.int8),
            "watch": draw.lognormal(2 * price, 0.4).astype(np.float32),
        }
    )
    hidden = path.with_name(f".{path.name}")
    frame.write_parquet(hidden, row_group_size=65_536)
    hidden.rename(path)


def write_log(root: Path, *, days: int, rows: int) -> None:
    """The log: one day more than is trained on, on which the last model is judged."""
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "schema.yaml", SCHEMA)
    for day in range(days + 1):
        path = root / f"day={day_name(day)}.parquet"
        if not path.is_file():
            write_day(path, day, rows)


def day_name(day: int) -> str:
    """YYYY-MM-DD."""
    return str(np.datetime64(FIRST_DAY + day, "D"))


class Call:
    """A call of daily training in a process group of its own.

    Args:
        log: the log.
        folder: ``daily.dir``.
        words: more overrides.
    """

    def __init__(self, log: Path, folder: Path, words: list[str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        fixed = [f"data.source={log}", f"daily.dir={folder}", "daily.max_auc_drop=1", "model=small", "optim=clippy"]
        fixed += ["trainer=cpu", "logger=none", "data.base_lr.laptop=0.1", "data.window=24h"]
        fixed += ["train.eval_every=0", "train.warmup_steps=20"]
        with (folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / "daily.py"), *fixed, *words],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def lines(self) -> int:
        """Days that are decided."""
        path = self.folder / "days.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def memory(self) -> int:
        """Anonymous memory of the processes of the call, bytes."""
        return sum(_anonymous(pid) for pid in _group(self.process.pid))

    def kill(self, *, all_processes: bool) -> None:
        """SIGKILL, to the supervisor alone or to its jobs too."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL) if all_processes else self.process.kill()
        self.process.wait()


def _group(leader: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ProcessLookupError):
            if os.getpgid(int(path.name)) == leader:
                yield int(path.name)


def _anonymous(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def undisturbed(log: Path, folder: Path, words: list[str]) -> dict[str, Any]:
    """One call to its end: seconds, and the highest memory while each day was in work."""
    began, call = time.monotonic(), Call(log, folder, words)
    peaks: dict[int, int] = defaultdict(int)
    while call.process.poll() is None:
        day = call.lines()
        peaks[day] = max(peaks[day], call.memory())
        time.sleep(POLL_SECONDS)
    if call.process.returncode:
        raise SystemExit(f"the undisturbed call ended with status {call.process.returncode}: {folder / 'output.txt'}")
    return {"seconds": time.monotonic() - began, "peaks_mb": [round(peaks[day] / 2**20) for day in sorted(peaks)]}


def disturbed(log: Path, folder: Path, words: list[str], *, kills: int, days: int, a_day: float, seed: int) -> int:
    """Calls that are killed, and a last one that ends; returns the number of kills.

    Args:
        log: the log.
        folder: ``daily.dir``.
        words: more overrides.
        kills: how often.
        days: days that are trained on.
        a_day: seconds that a day takes.
        seed: of the times of the kills.
    """
    draw, done = random.Random(seed), 0
    # After how many days, and how many seconds later.
    plan = [(days * kill // kills, draw.uniform(0, 0.8) * a_day) for kill in range(kills)]
    while True:
        call = Call(log, folder, words)
        target, patience = plan[done] if done < kills else (None, 0.0)
        since = None
        while call.process.poll() is None:
            if target is not None and call.lines() >= target:
                since = since or time.monotonic()
                if time.monotonic() - since > patience:
                    call.kill(all_processes=(done + 1) % 3 != 0)
                    done += 1
                    break
            time.sleep(POLL_SECONDS)
        else:
            if call.process.returncode:
                raise SystemExit(f"a call ended with status {call.process.returncode}: {folder / 'output.txt'}")
            return done


def compare(one: Path, other: Path) -> tuple[int, list[str]]:
    """Number of tensors that were compared over all kept days, and those that differ."""
    seen, wrong = 0, []
    for state in sorted((one / "states").iterdir()):
        first, second = (
            torch.load(by_step(folder / "states" / state.name / "checkpoints")[-1], weights_only=True)
            for folder in (one, other)
        )
        for name, tensor in first["state_dict"].items():
            seen += 1
            if not torch.equal(tensor, second["state_dict"][name]):
                wrong.append(f"{state.name}: {name}")
        for number, values in first["optimizer_states"][0]["state"].items():
            seen += 1
            if not torch.equal(values["sum"], second["optimizer_states"][0]["state"][number]["sum"]):
                wrong.append(f"{state.name}: accumulator {number}")
    return seen, wrong


def growth(peaks: list[int]) -> float:
    """Memory of the last third of the days beside that of the first third."""
    third = max(len(peaks) // 3, 1)
    return max(peaks[-third:]) / max(peaks[:third])


def main() -> int:
    """Runs both chains and says what was found; exit status 1 where weights differ or memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of a day")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--out", type=Path, default=Path("build/bench_daily"))
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("words", nargs="*", help="more overrides of both chains")
    options = parser.parse_intermixed_args()
    out = options.out.resolve()
    log = out / "log"
    write_log(log, days=options.days, rows=options.rows)
    words = [f"scale.batch_size={options.batch}", *options.words]
    made = out / "undisturbed.json"
    if not made.is_file():
        write_text(made, json.dumps(undisturbed(log, out / "undisturbed", words)))
    whole = json.loads(made.read_text())
    a_day = whole["seconds"] / options.days
    kills = disturbed(
        log, out / "disturbed", words, kills=options.kills, days=options.days, a_day=a_day, seed=options.seed
    )
    tensors, wrong = compare(out / "undisturbed", out / "disturbed")
    verdicts = [
        [json.loads(line)["verdict"] for line in (out / name / "days.jsonl").read_text().splitlines()]
        for name in ("undisturbed", "disturbed")
    ]
    result = {
        "days": options.days,
        "rows_per_day": options.rows,
        "batch_size": options.batch,
        "kills": kills,
        "seconds": round(whole["seconds"], 1),
        "rows_per_second": round(options.days * options.rows / whole["seconds"]),
        "memory_mb_by_day": whole["peaks_mb"],
        "memory_growth": round(growth(whole["peaks_mb"][: options.days]), 3),
        "tensors_compared": tensors,
        "tensors_that_differ": wrong,
        "verdicts_equal": verdicts[0] == verdicts[1],
        "machine": machine(),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    return int(bool(wrong) or not result["verdicts_equal"] or result["memory_growth"] > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
