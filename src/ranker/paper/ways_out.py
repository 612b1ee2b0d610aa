"""What each way out of a divergence is worth: runs that were lost in mid-run, again with each of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ranker.paper.jobs import Data, Job, Setting, grid
from ranker.paper.store import find, matching, row_of
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown
from ranker.runs.run_folder import EVENTS as EVENTS_FILE

# Nothing ends a lost run, so that each has an AUC at the end.
LOST: Job = ("model=small", "optim=adagrad", "callbacks.divergence.stop=false")
RATE, TWIN_RATE = 1, 0.25
SEEDS, EVENTS = 12, 8  # seeds that are tried, and events at most that are treated
WAYS: dict[str, str] = {
    "rollback": "rollback",
    "rollback, then the rate rises from a tenth": "rollback_rewarm",
    "rollback, then Clippy": "rollback_clippy",
    "accumulators given back": "give_back_accumulators",
    "rollback, then GC that clips the accumulators": "clip_accumulator",
    "Clippy from then on": "switch_to_clippy",
    "the rate rises from a tenth": "rewarm",
    "steps with an infinite gradient left out": "skip_nonfinite",
}
VERDICT = {"event_step": "step", "verdict_step": "judged_at"}  # column: field of the first full event
LEARNED = 100  # steps after which the AUC of an undisturbed run has come most of its way
LEFT = 50  # steps after the verdict that a run must have, so that a way out can act
LATE = pl.col("event_step") > LEARNED
IN_TIME = pl.col("verdict_step") <= pl.col("steps") - LEFT
KEYS = ("lr_mult", "seed", "mitigation")


def read(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:  # noqa: ARG001
    """One row per run, with the step of the first full verdict, the number of rollbacks and the batches left out."""
    found, missing = find(folder, jobs)
    rows = []
    for job, (path, summary) in found:
        events = path / EVENTS_FILE
        lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
        full = [event for event in map(json.loads, lines) if event["kind"] == "full"]
        left_out = [record["skipped_batches"] for record in summary["rollbacks"]]
        row = row_of(job, path, summary) | {"rollbacks": len(left_out)}
        row |= {key: full[0][source] if full else None for key, source in VERDICT.items()}
        row["batches_left_out"] = sum(stop - start for start, stop in left_out)
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None), missing


def event_jobs(setting: Setting) -> list[Job]:
    """The rate at which some runs are lost, with no way out."""
    return grid((*setting.bare, *LOST), {"lr_mult": (RATE,), "seed": range(2 if setting.quick else SEEDS)})


def treated(found: Found) -> list[int]:
    """Seeds of the first runs that were lost after they had learned, with steps left to act in."""
    runs = found.get("ways_out_events")
    if runs is None or runs.is_empty():
        return []
    return sorted(runs.filter(LATE, IN_TIME)["seed"].to_list())[:EVENTS]


def way_jobs(setting: Setting, found: Found) -> list[Job]:
    """For each event the twin at a rate that it survives, and each way out."""
    seeds = treated(found)
    jobs = grid((*setting.bare, *LOST), {"lr_mult": (TWIN_RATE,), "seed": seeds})
    for way in list(WAYS.values())[: 1 if setting.quick else None]:
        jobs += grid((*setting.bare, *LOST), {"lr_mult": (RATE,), "mitigation": (way,), "seed": seeds})
    return jobs


def sections(data: Data, found: Found) -> Sections:
    """AUC of each way out per event, and its distance to the twin."""
    events, runs, seeds = found["ways_out_events"], found["ways_out"], treated(found)
    metric = f"{data.auc}/auc"
    if "mitigation" not in runs.columns:
        runs = runs.with_columns(pl.lit(None, dtype=pl.String).alias("mitigation"))

    def auc(frame: pl.DataFrame, seed: int, *overrides: str) -> float | None:
        here = matching(frame, (*overrides, f"seed={seed}"), KEYS)[metric].to_list()
        return here[0] if here else None

    twins = [auc(runs, seed, f"lr_mult={TWIN_RATE:g}") for seed in seeds]
    rows = [[f"twin at {TWIN_RATE:g}x", *map(_percent, twins), ""]]
    lines = {"no action": [auc(events, seed, f"lr_mult={RATE:g}") for seed in seeds]}
    for label, way in WAYS.items():
        lines[label] = [auc(runs, seed, f"lr_mult={RATE:g}", f"mitigation={way}") for seed in seeds]
    for label, aucs in lines.items():
        below = [t - a for t, a in zip(twins, aucs, strict=True) if t is not None and a is not None]
        if any(a is not None for a in aucs):
            middle = f"{100 * statistics.median(below):.1f}" if below else "-"
            rows.append([label, *map(_percent, aucs), middle])
    header = [f"{data.auc} AUC, %", *(f"seed {seed}" for seed in seeds), "below the twin, median"]
    return {"auc": as_markdown(header, rows), "events": _events(events, runs, seeds)}


def _events(events: pl.DataFrame, runs: pl.DataFrame, seeds: Sequence[int]) -> str:
    """First step of the divergence (not of an earlier spike), step of the verdict, and what the rollback left out."""
    rows = []
    for seed in seeds:
        event = events.row(by_predicate=pl.col("seed") == seed, named=True)
        back = matching(runs, (f"lr_mult={RATE:g}", f"seed={seed}", "mitigation=rollback"), KEYS)
        left_out = [f"{n} of {event['steps']}" for n in back["batches_left_out"]]
        rows.append([str(seed), *(_whole(event[key]) for key in ("event_step", "verdict_step")), *(left_out or ["-"])])
    unhurt = events.filter(pl.col("event_step").is_null()).height
    early, last = events.filter(~LATE).height, events.filter(~IN_TIME).height
    text = f"{events.height} seeds at {RATE:g}x: {unhurt} undisturbed, {early} lost in the first {LEARNED} steps and "
    text += f"{last} with a verdict in the last {LEFT} (not treated here).\n\n"
    head = ["seed", "first step of the divergence", "verdict at step", "batches that the rollback left out"]
    return text + as_markdown(head, rows)


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{int(value):,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


WAYS_OUT = Study(
    name="ways_out",
    title="What each way out of a mid-run divergence is worth (Small, naive Adagrad)",
    phases=(
        Phase("ways_out_events", lambda setting, _: event_jobs(setting), read),
        Phase("ways_out", way_jobs, read),
    ),
    sections=sections,
)
