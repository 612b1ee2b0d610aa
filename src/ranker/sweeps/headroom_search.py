"""The search for the largest stable learning rate, as rounds of jobs for one of Hydra's launchers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from ranker.errors import UserError
from ranker.reports.headroom_report import Entry, report
from ranker.runs.run_folder import SUMMARY
from ranker.stability.lr_headroom import Outcome, Search, settled

OURS = {"lr_mult": "headroom.lowest and headroom.highest", "seed": "headroom.seeds"}  # what the search itself sets


@dataclass(frozen=True, kw_only=True)
class Options:
    """What conf/hydra/sweeper/headroom.yaml says; see there."""

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
        """How learning rates are chosen."""
        return Search(
            lowest=float(self.lowest),
            highest=float(self.highest),
            step=float(self.step),
            tolerance=float(self.tolerance),
            points=self.points,
        )


@dataclass
class Candidate:
    """One combination of the command line's values, and what its runs did.

    Attributes:
        label: the overrides that tell it from the others; empty where it is the only one.
        overrides: all of them.
        runs: outcomes as read, with a summary each.
    """

    label: str
    overrides: list[str]
    runs: list[tuple[Outcome, Mapping[str, Any]]] = field(default_factory=list)

    def outcomes(self, min_auc: float) -> list[Outcome]:
        """What the runs say together."""
        return settled([outcome for outcome, _ in self.runs], min_auc=min_auc)


def search(
    arguments: Sequence[str],
    *,
    options: Options,
    launcher: Launcher,
    folder: Path,
    validate: Callable[[list[list[str]]], None],
) -> list[Entry]:
    """Runs rounds until every combination is done, and reports; also what is known so far, when it is broken off.

    Args:
        arguments: overrides, some maybe with several values.
        options: range, seeds, steps and the like.
        launcher: starts the jobs.
        folder: where runs and report go.
        validate: composes jobs, to find a mistake before anything is started.

    Returns:
        What the report says of each combination.

    Raises:
        UserError: an override sets what the search sets.
    """
    rates = options.rates
    candidates = combinations(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    try:
        for round_number in itertools.count(1):
            jobs = [
                (candidate, rate, seed)
                for candidate in candidates
                for rate in rates.next_rates(candidate.outcomes(options.min_auc))
                for seed in range(options.seeds)
            ]
            if not jobs:
                break
            print(f"round {round_number}: {_words(candidates, jobs)}", flush=True)
            batch = [[*c.overrides, f"lr_mult={rate:g}", f"seed={seed}"] for c, rate, seed in jobs]
            if round_number == 1:
                validate(batch[:: options.seeds])
            returns = launcher.launch(batch, initial_job_idx=number)
            number += len(batch)
            for (candidate, rate, seed), result in zip(jobs, returns, strict=True):
                summary = summary_of(result)
                candidate.runs.append((outcome_of(summary, rate=rate, seed=seed), summary))
    finally:
        entries = [
            Entry.of(
                candidate.label,
                candidate.overrides,
                candidate.outcomes(options.min_auc),
                [summary for _, summary in candidate.runs],
                confidence=options.confidence,
            )
            for candidate in candidates
        ]
        report(entries, folder, confidence=options.confidence)
    return entries


def combinations(arguments: Sequence[str]) -> list[Candidate]:
    """Every combination of the values on the command line.

    Raises:
        UserError: an override sets what the search sets.
    """
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    for key in (override.key_or_group for override in parsed):
        if key in OURS:
            raise UserError(f"the search sets {key} itself; use {OURS[key]}")
    swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]
    found = []
    for overrides in BasicSweeper.split_arguments(parsed, None)[0]:
        label = " ".join(item for item in overrides if item.split("=", 1)[0] in swept)
        found.append(Candidate(label, overrides))
    return found


def _words(candidates: Sequence[Candidate], jobs: Sequence[tuple[Candidate, float, int]]) -> str:
    """Which learning rates a round tries, in one line."""
    parts = []
    for candidate in candidates:
        rates = sorted({rate for owner, rate, _ in jobs if owner is candidate})
        if rates:
            parts.append(f"{candidate.label or 'lr'} at {', '.join(f'{rate:g}x' for rate in rates)}")
    return f"{len(jobs)} runs, {'; '.join(parts)}"


def summary_of(result: JobReturn) -> Mapping[str, Any]:
    """What a job's run folder says of it; a failure where it says nothing."""
    folder = Path(result.hydra_cfg.hydra.runtime.output_dir) if result.hydra_cfg is not None else None
    if folder is not None and (folder / SUMMARY).is_file():
        return {**json.loads((folder / SUMMARY).read_text(encoding="utf-8")), "run": str(folder)}
    try:
        reason = str(result.return_value)
    except Exception as error:  # Hydra gives back, on access, whatever the job raised
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {"status": "failed", "reason": reason, "metrics": {}, "run": str(folder)}


def outcome_of(summary: Mapping[str, Any], *, rate: float, seed: int) -> Outcome:
    """Whether the run survived."""
    survived = {"completed": True, "diverged": False}.get(summary["status"])
    aucs = [value for name, value in summary["metrics"].items() if name.endswith("/auc")]
    auc = math.nan if not aucs or aucs[0] is None else float(aucs[0])
    return Outcome(rate=rate, seed=seed, survived=survived, auc=auc, reason=summary.get("reason") or "")
