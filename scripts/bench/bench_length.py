"""What the length of a run costs: ``python scripts/bench/bench_length.py LOG FOLDER --rows 100000000``.

LOG is a prepared log, such as ``scripts/prepare_data.py synthetic LOG --set data.log.train_rows=100000000`` writes.
One run of Small over it in three attempts: the first million rows, all but the last million, the last million. So the
run is resumed near its beginning and near its end. Reported are rows per CPU second and memory at the beginning and at
the end, the CPU seconds of a checkpoint and of a start, and the sizes of metrics.csv and of the run's page. CPU seconds
of the process are counted, so that other work on the machine weighs little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_report import Line, report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def train(folder: Path, words: Sequence[str]) -> None:
    """Runs train.py, and ends this program where it fails."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(ROOT / "train.py"), *words]
    with (folder.parent / f"{folder.name}.out").open("a", encoding="utf-8") as out:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=out, stderr=out)


def run(given: argparse.Namespace) -> None:
    """The three attempts."""
    steps, part = given.rows // given.batch_size, max(1, given.part // given.batch_size)
    ledger = given.folder.parent / f"{given.folder.name}.jsonl"
    first = [
        "data=parquet",
        f"data.source={given.log}",
        "model=small",
        "trainer=cpu",
        "logger=csv",
        f"scale.batch_size={given.batch_size}",
        f"data.window={8 * given.batch_size}",
        f"train.max_steps={part}",
        f"hydra.run.dir={given.folder}",
        "+callbacks.ledger._target_=length_ledger.Ledger",
        f"+callbacks.ledger.path={ledger}",
        f"+callbacks.ledger.every={max(1, part // 8)}",
        f"+callbacks.ledger.batch_size={given.batch_size}",
        *given.overrides,
    ]
    train(given.folder, first)
    for limit in (steps - part, steps):
        train(given.folder, [f"resume={given.folder}", "trust=[length_ledger.Ledger]", f"train.max_steps={limit}"])


def lines_of(given: argparse.Namespace) -> list[Line]:
    """What the run cost at its beginning and at its end."""
    text = (given.folder.parent / f"{given.folder.name}.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    starts = [entry for entry in found if "start" in entry]
    written = [entry for entry in found if "checkpoint" in entry]
    long = _second_attempt(found)
    total = long[-1]["rows"] - long[0]["rows"]
    tenth = total // 10
    early = [entry for entry in long if entry["rows"] <= long[0]["rows"] + tenth]
    late = [entry for entry in long if entry["rows"] >= long[-1]["rows"] - tenth]
    few = max(1, len(written) // 10)
    lines = [
        Line("rows of the long attempt", total, "rows"),
        Line("speed of the first tenth", _speed(early), "rows/CPU s"),
        Line("speed of the last tenth", _speed(late), "rows/CPU s"),
        Line("speed of the last tenth / first", _speed(late) / _speed(early), "ratio"),
        Line("memory in the first tenth", _memory(early), "MB"),
        Line("memory in the last tenth", _memory(late), "MB"),
        Line("memory of the last tenth / first", _memory(late) / _memory(early), "ratio"),
        Line("a checkpoint, first tenth", statistics.median(e["cpu"] for e in written[:few]), "CPU s"),
        Line("a checkpoint, last tenth", statistics.median(e["cpu"] for e in written[-few:]), "CPU s"),
        Line("a new run, until its first step", starts[0]["cpu"], "CPU s"),
        Line(f"resumed at step {starts[1]['start']}, until its first step", starts[1]["cpu"], "CPU s"),
        Line(f"resumed at step {starts[-1]['start']}, until its first step", starts[-1]["cpu"], "CPU s"),
    ]
    metrics = given.folder / "metrics.csv"
    lines.append(Line("metrics.csv", metrics.stat().st_size / 1e6, "MB"))
    lines.append(Line("metrics.csv", metrics.read_bytes().count(b"\n") - 1, "rows"))
    page, begin = given.folder / "report.html", time.process_time()
    from ranker.reports.run_page import Recorded, render

    page.write_text(render(Recorded.read(given.folder)), encoding="utf-8")
    lines.append(Line("the page, to make", time.process_time() - begin, "CPU s"))
    lines.append(Line("the page", page.stat().st_size / 1e6, "MB"))
    return lines


def _second_attempt(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the attempt between the second and the third start."""
    places = [place for place, entry in enumerate(found) if "start" in entry]
    return [entry for entry in found[places[1] : places[2]] if "rows" in entry]


def _speed(entries: Sequence[dict[str, Any]]) -> float:
    return float((entries[-1]["rows"] - entries[0]["rows"]) / (entries[-1]["cpu"] - entries[0]["cpu"]))


def _memory(entries: Sequence[dict[str, Any]]) -> float:
    return statistics.median(entry["megabytes"] for entry in entries)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints the table, and returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="a prepared log")
    parser.add_argument("folder", type=Path, help="the run folder to make; what was measured stands in FOLDER.jsonl")
    parser.add_argument("overrides", nargs="*", help="further overrides of the run")
    parser.add_argument("--rows", type=int, required=True, help="training rows to use")
    parser.add_argument("--part", type=int, default=1_000_000, help="rows of the first and of the last attempt")
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--only-report", action="store_true", help="the run is there already")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    given = parser.parse_intermixed_args(arguments)
    given.folder = given.folder.resolve()
    if not given.only_report:
        run(given)
    return report(lines_of(given), given.json, title=f"{given.rows:,} rows in batches of {given.batch_size:,}")


if __name__ == "__main__":
    sys.exit(main())
