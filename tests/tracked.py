"""What W&B, TensorBoard and MLflow have of a run, read from the files that they leave on this machine."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from ranker.training.wandb_files import GLOBAL_STEP, ROW, files_of, records, row_of

Values = dict[tuple[int, str], float]


def finished_records(path: Path) -> list[Any]:
    """The records of an attempt that ended. W&B's own process may still be writing when ``finish`` returns."""
    deadline = time.monotonic() + 30
    while True:
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, [record.WhichOneof("record_type") for record in found]
        time.sleep(0.05)


def wandb_records(folder: Path, *, ended: bool = True) -> list[list[Any]]:
    """The records of each attempt; the newest one has ended, or was cut off."""
    *killed, newest = files_of(folder, json.loads((folder / "tracker.json").read_text())["wandb"])
    return [*(list(records(path)) for path in killed), finished_records(newest) if ended else list(records(newest))]


def wandb_values(folder: Path, *, ended: bool = True) -> tuple[Values, Counter[tuple[int, str]]]:
    """Values by (step, name) over all attempts, and how often each was sent."""
    values: Values = {}
    count: Counter[tuple[int, str]] = Counter()
    for attempt in wandb_records(folder, ended=ended):
        for record in attempt:
            if record.WhichOneof("record_type") != "history":
                continue
            row = {name: json.loads(text) for name, text in row_of(record).items()}
            for name, value in row.items():
                if not name.startswith("_") and name != GLOBAL_STEP and "histograms/" not in name:
                    values[int(row[GLOBAL_STEP]), name] = float(value)
                    count[int(row[GLOBAL_STEP]), name] += 1
    return values, count


def wandb_rows(folder: Path) -> list[int]:
    """W&B's own numbers of the rows of all attempts."""
    history = [r for attempt in wandb_records(folder) for r in attempt if r.WhichOneof("record_type") == "history"]
    return [int(row_of(record)[ROW]) for record in history]


def wandb_summary(folder: Path) -> dict[str, Any]:
    """The summary that the newest attempt leaves."""
    found: dict[str, Any] = {}
    for record in wandb_records(folder)[-1]:
        if record.WhichOneof("record_type") == "summary":
            found |= {u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in record.summary.update}
    return found


def tensorboard_values(folder: Path) -> tuple[Values, Counter[tuple[int, str]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    values: Values = {}
    count: Counter[tuple[int, str]] = Counter()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            values[event.step, name] = event.value
            count[event.step, name] += 1
    return values, count


def mlflow_values(folder: Path) -> tuple[Values, Counter[tuple[int, str]]]:
    from mlflow import MlflowClient

    known = json.loads((folder / "tracker.json").read_text())
    values: Values = {}
    count: Counter[tuple[int, str]] = Counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*noload.* loader strategy is deprecated")  # as the tracker does
        client = MlflowClient(known["mlflow_uri"])
        names = list(client.get_run(known["mlflow"]).data.metrics)
    for name in names:
        for metric in client.get_metric_history(known["mlflow"], name):
            values[metric.step, name] = metric.value
            count[metric.step, name] += 1
    return values, count
