"""``evenkeel headroom --find-base-lr``: 1x of a log, found with short runs and written where the next run reads it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ranker import cli
from ranker.data.base_lr import write_base_lr
from ranker.errors import UserError
from ranker.installation import command_line
from ranker.runs.run_folder import CONFIG, SUMMARY
from ranker.stability.base_rate import base_rate
from ranker.stability.lr_headroom import Outcome

OPTION = "--find-base-lr"
HELP = f"""Find 1x of a log with short runs of naive Adagrad, and write it where the next run reads it.

    python scripts/stability.py {OPTION} data=parquet data.source=DIR
    python scripts/stability.py {OPTION} data=parquet data.source=DIR model=large headroom.seeds=5 train.max_steps=-1

1x is the smallest rate at which most runs are lost; at a quarter of it naive Adagrad trains. For data=parquet it is
written to DIR/base_lr.yaml, which `train.py data=parquet data.source=DIR` reads. For other data the last line says
which option sets it. Other options as without {OPTION}; conf/hparams_search/base_lr.yaml says how long a run is.
"""


def find(words: Sequence[str], search: Callable[[], None]) -> int:
    """Runs the search and writes what it found; the exit status.

    Args:
        words: Hydra overrides of the user.
        search: runs Hydra's multirun with ``sys.argv``.
    """
    folder = _folder(words)
    sys.argv = [sys.argv[0], "-m", "hparams_search=base_lr", *words, f'hydra.sweep.dir="{folder}"']
    search()
    return _write(folder)


@cli.command
def _write(folder: Path) -> int:
    from ranker.reports.headroom_report import JSON  # imported late: --help need not wait for matplotlib and polars

    report = folder / JSON
    if not report.is_file():
        raise UserError(f"no {JSON} in {folder}: no run has ended")
    entries = json.loads(report.read_text(encoding="utf-8"))["entries"]
    if len(entries) != 1:
        raise UserError(
            f"{OPTION} finds one rate, and several combinations were searched; give one value to each option"
        )
    runs: list[dict[str, Any]] = entries[0]["runs"]
    found = base_rate([_outcome(run) for run in runs])
    cfg, present = _of_a_run(runs)
    data, scale = cfg["data"]["name"], cfg["scale"]["name"]
    rate = float(f"{present * found.multiple:.3g}")
    print(f"1x is {rate:g}: {found.reason} ({present:g})")
    for doubt in found.doubts:
        print(f"warning: {doubt}")
    source = cfg["data"].get("source")
    made = f"Found with {cfg['model']['name']}, batches of {cfg['scale']['batch_size']} rows: {found.reason}."
    path = write_base_lr(source, scale, rate, note=made) if data == "parquet" and source else None
    option = f"data.base_lr.{scale}={rate:g}"
    if path is None:
        print(f"set it with {option}")
    else:
        print(f"{path}: read by {command_line('train')} data=parquet data.source={source}  ({option} takes precedence)")
    return 0


def _folder(words: Sequence[str]) -> Path:
    """The folder of the search: as given, or one by the name of the log, so that logs do not mix."""
    given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    if "hydra.sweep.dir" in given:
        return Path(given["hydra.sweep.dir"].strip("'\""))
    source = given.get("data.source", given.get("data.root", "")).strip("'\"")
    return Path("base_lr") / (Path(source).name or given.get("data", "synthetic"))


def _outcome(run: dict[str, Any]) -> Outcome:
    auc = run["auc"]
    return Outcome(
        rate=run["rate"],
        seed=run["seed"],
        survived=run["survived"],
        auc=float("nan") if auc is None else auc,
        reason=run["reason"],
    )


def _of_a_run(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """The configuration of one of the runs, and what 1x was in it."""
    for run in runs:
        folder = Path(run["run"] or "")
        if (folder / SUMMARY).is_file() and (folder / CONFIG).is_file():
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            cfg = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
            if summary.get("base_lr"):
                return cfg, float(summary["base_lr"])
    raise UserError("no run left a summary.json, so 1x is not known")
