"""The sweeper ``hydra/sweeper=headroom``: searches for the largest stable learning rate in rounds of jobs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from ranker.errors import UserError
from ranker.hydra_private import expand, parse
from ranker.reports.headroom_report import Entry, report
from ranker.runs.run_folder import SUMMARY
from ranker.stability.lr_headroom import Outcome, Search

# Keys that the search sets, and the options that control them.
RESERVED = {"lr_mult": "headroom.lowest and headroom.highest", "seed": "headroom.seeds"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options in conf/hydra/sweeper/headroom.yaml, which documents them."""

    lowest: float
    highest: float
    step: float
    tolerance: float
    points: int
    seeds: int
    confidence: float
    min_auc: float

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"headroom.seeds must be 1 or more, got {self.seeds}")
        if not 0 < self.confidence < 1:
            raise UserError(f"headroom.confidence must lie between 0 and 1, got {self.confidence}")

    @property
    def rates(self) -> Search:
        """The search that chooses the learning rates of each round."""
        numbers = {name: float(getattr(self, name)) for name in ("lowest", "highest", "step", "tolerance")}
        return Search(**numbers, points=self.points)


def search(
    arguments: Sequence[str],
    *,
    options: Options,
    launcher: Launcher,
    folder: Path,
    validate: Callable[[list[list[str]]], None],
    before: Callable[[list[list[str]], int], None] = lambda _jobs, _first: None,
) -> list[Entry]:
    """Runs rounds until every combination is bracketed, then writes the report. An interrupted search reports too.

    Args:
        arguments: overrides; some may have several values.
        options: range, seeds, step and so on.
        launcher: starts the jobs.
        folder: where run folders and the report go.
        validate: composes jobs, to find mistakes before anything starts.
        before: called with the jobs of a round and the number of the first one, before they are launched.

    Returns:
        The report's entry of each combination.

    Raises:
        UserError: an override sets a key that the search sets.
    """
    rates = options.rates
    entries = combinations(arguments, options)
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    try:
        for round_number in itertools.count(1):
            jobs = [
                (entry, rate, seed)
                for entry in entries
                for rate in rates.next_rates(entry.outcomes)
                for seed in range(options.seeds)
            ]
            if not jobs:
                break
            print(f"round {round_number}: {_describe(entries, jobs)}", flush=True)
            batch = [[*entry.overrides, f"lr_mult={rate:g}", f"seed={seed}"] for entry, rate, seed in jobs]
            if round_number == 1:
                validate(batch[:: options.seeds])
            before(batch, number)
            returns = launcher.launch(batch, initial_job_idx=number)
            number += len(batch)
            for (entry, rate, seed), result in zip(jobs, returns, strict=True):
                summary = summary_of(result)
                entry.runs.append((outcome_of(summary, rate=rate, seed=seed), summary))
    finally:
        report(entries, folder, confidence=options.confidence)
    return entries


def combinations(arguments: Sequence[str], options: Options) -> list[Entry]:
    """Every combination of the values on the command line.

    Raises:
        UserError: an override sets a key that the search sets.
    """
    parsed = parse(arguments)
    for key in (override.key_or_group for override in parsed):
        if key in RESERVED:
            raise UserError(f"the search sets {key} itself; use {RESERVED[key]}")
    swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]
    found = []
    for overrides in expand(parsed):
        label = " ".join(item for item in overrides if item.split("=", 1)[0] in swept)
        found.append(Entry(label, overrides, options.min_auc, options.confidence))
    return found


def _describe(entries: Sequence[Entry], jobs: Sequence[tuple[Entry, float, int]]) -> str:
    """The learning rates of a round, in one line."""
    parts = []
    for entry in entries:
        rates = sorted({rate for owner, rate, _ in jobs if owner is entry})
        if rates:
            parts.append(f"{entry.label or 'lr'} at {', '.join(f'{rate:g}x' for rate in rates)}")
    return f"{len(jobs)} runs, {'; '.join(parts)}"


def summary_of(result: JobReturn) -> Mapping[str, Any]:
    """The summary in a job's run folder; a failure if there is none."""
    folder = Path(result.hydra_cfg.hydra.runtime.output_dir) if result.hydra_cfg is not None else None
    if folder is not None and (folder / SUMMARY).is_file():
        return {**json.loads((folder / SUMMARY).read_text(encoding="utf-8")), "run": str(folder)}
    try:
        reason = str(result.return_value)
    except Exception as error:  # Hydra raises the error of the job on access
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {"status": "failed", "reason": reason, "metrics": {}, "run": str(folder)}


def outcome_of(summary: Mapping[str, Any], *, rate: float, seed: int) -> Outcome:
    """The outcome of a run, from its summary.

    Args:
        summary: as in summary.json.
        rate: its learning rate, in multiples of 1x.
        seed: its seed.
    """
    survived = {"completed": True, "diverged": False}.get(summary["status"])
    aucs = [value for name, value in summary["metrics"].items() if name.endswith("/auc")]
    auc = math.nan if not aucs or aucs[0] is None else float(aucs[0])
    return Outcome(rate=rate, seed=seed, survived=survived, auc=auc, reason=summary.get("reason") or "")
