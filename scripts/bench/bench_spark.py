"""Preparation by Polars and by Spark on the same unsorted log: time, memory, and whether the rows are the same.

    build/spark/bin/python scripts/bench/bench_spark.py FOLDER --rows 20000000 --master 'local[2]' \
        --spark-conf spark.driver.memory=1g

Needs PySpark and Java (``make test-spark`` makes the environment). FOLDER/raw is made once: the generated log in FILES
Parquet files, of which each has rows of all days in no order, and one row of a hundred twice. Time and memory are of
all processes of an engine, looked at four times a second: CPU seconds, and the largest sum of proportional set sizes.
Prints one line of JSON for each engine, and one for the comparison. Exit status 1: rows differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from ranker.atomic import replacing_folder
from ranker.data.manifest import Manifest
from ranker.data.prepare.generated import raw_frames
from ranker.data.schema import SCHEMA_FILE
from ranker.data.synthetic import SyntheticLog

ROOT = Path(__file__).resolve().parents[2]
FILES, DAYS, GROUP = 8, 20, 65_536


def make_raw(folder: Path, rows: int) -> None:
    """The generated log, dealt to files block by block. Its schema comes beside the folder, which is empty."""
    per_day = -(-rows // DAYS)
    log = SyntheticLog(train_rows=rows - per_day, eval_rows=per_day, rows_per_day=per_day, signals=4)
    held: list[list[pl.DataFrame]] = [[] for _ in range(FILES)]
    with ExitStack() as stack:
        writers: list[pq.ParquetWriter] = []
        for number, frame in enumerate(raw_frames(log)):
            if not writers:
                schema = frame.to_arrow().schema
                writers += [
                    stack.enter_context(pq.ParquetWriter(folder / f"{i}.parquet", schema)) for i in range(FILES)
                ]
            twice = frame.sample(fraction=0.01, seed=number)
            file = number % FILES
            held[file] += [frame, twice]
            if sum(map(len, held[file])) >= GROUP:
                _write(writers[file], held[file], seed=number)
        for file, frames in enumerate(held):
            if frames:
                _write(writers[file], frames, seed=file)
    log.schema.to_yaml(folder.parent / SCHEMA_FILE)


def _write(writer: pq.ParquetWriter, frames: list[pl.DataFrame], *, seed: int) -> None:
    rows = pl.concat(frames).sample(fraction=1.0, shuffle=True, seed=seed)
    writer.write_table(rows.to_arrow().cast(writer.schema), row_group_size=GROUP)
    frames.clear()


def prepared(command: list[str]) -> dict[str, float]:
    """Runs an engine and measures it.

    Raises:
        SystemExit: it failed.
    """
    start, peak, ticks = time.monotonic(), 0.0, dict[int, int]()
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while running.poll() is None:
        memory = 0.0
        for process in _tree(running.pid):
            with suppress(OSError):  # it has ended
                memory += _pss_mib(process)
                ticks[process] = _ticks(process)
        peak = max(peak, memory)
        time.sleep(0.25)
    if running.returncode:
        raise SystemExit(f"status {running.returncode}: {' '.join(command)}")
    cpu = sum(ticks.values()) / os.sysconf("SC_CLK_TCK")
    return {"seconds": time.monotonic() - start, "cpu_seconds": cpu, "peak_mib": peak}


def _tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for process in found:
        with suppress(OSError):
            for task in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def _pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _ticks(pid: int) -> int:
    """CPU time of a process, with that of its threads."""
    user, system = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


def compared(one: Path, many: Path) -> dict[str, Any]:
    """Rows and days that both engines have written, and whether all rows are the same in the same order."""
    days: dict[str, list[list[Path]]] = {}
    for side, root in enumerate((one, many)):
        manifest = Manifest.read(root)
        assert manifest is not None
        for entry in manifest.files:
            day = entry.path.partition("/")[0].removesuffix(".parquet")
            days.setdefault(day, [[], []])[side].append(root / entry.path)
    rows, differ = 0, []
    for day, sides in days.items():
        frames = [pl.concat([pl.read_parquet(p, hive_partitioning=False) for p in paths]) for paths in sides if paths]
        rows += len(frames[0])
        if len(frames) != 2 or not frames[0].equals(frames[1]):
            differ.append(day)
    return {"rows": rows, "days": len(days), "days_that_differ": differ}


def main() -> int:
    """Makes the log, runs both engines and compares what they have written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the raw log and for what both engines write; 3 times the log")
    parser.add_argument("--rows", type=float, default=2e7, help="rows of the log (%(default)g)")
    parser.add_argument("--master", default="local[2]", help="as of prepare_data.py (%(default)s)")
    parser.add_argument("--spark-conf", nargs="+", default=["spark.driver.memory=1g"], help="as of prepare_data.py")
    given = parser.parse_args()
    raw, targets = given.folder / "raw", [given.folder / name for name in ("polars", "spark")]
    for target in targets:
        if target.exists():
            raise SystemExit(f"{target} exists: remove it, or name another folder")
    if not raw.is_dir():
        given.folder.mkdir(parents=True, exist_ok=True)
        with replacing_folder(raw) as draft:
            make_raw(draft, int(given.rows))
    size = sum(path.stat().st_size for path in raw.iterdir())
    print(json.dumps({"raw_mib": round(size / 2**20), "files": FILES}), flush=True)
    spark = ["--engine", "spark", "--master", given.master, "--spark-conf", *given.spark_conf]
    for target, more in zip(targets, ([], spark), strict=True):
        command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "log", str(raw), str(target), "--quiet"]
        found = prepared([*command, "--schema", str(given.folder / SCHEMA_FILE), *more])
        print(
            json.dumps({"engine": target.name} | {name: round(value, 1) for name, value in found.items()}), flush=True
        )
    result = compared(*targets)
    print(json.dumps(result))
    return 1 if result["days_that_differ"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
