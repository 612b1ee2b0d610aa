"""What each way out of a divergence is worth: runs that were lost in mid-run, again with each of them."""

from __future__ import annotations

import statistics

import polars as pl

from ranker.paper.jobs import Data, Job, Setting, grid
from ranker.paper.store import matching
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown

WARMUP = 100
# Naive Adagrad on Small with an accumulator that adapts, at the highest rate at which some seeds survive: it learns,
# and some seeds are lost in mid-run. Nothing ends a lost run, so that each has an AUC at the end.
LOST: Job = (
    "model=small",
    "optim=adagrad",
    "optim.initial_accumulator_value=1e-6",
    "scale.batch_size=256",
    f"train.warmup_steps={WARMUP}",
    "callbacks.divergence.stop=false",
)
RATE, TWIN_RATE = 0.8, 0.4
SEEDS, EVENTS = 12, 6  # seeds that are tried, and events at most that are treated
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
KEYS = ("lr_mult", "seed", "mitigation")


def event_jobs(setting: Setting) -> list[Job]:
    """The rate at which some runs are lost, with no way out."""
    return grid((*setting.bare, *LOST), {"lr_mult": (RATE,), "seed": range(2 if setting.quick else SEEDS)})


def treated(found: Found) -> list[int]:
    """Seeds of the first runs that were disturbed after the warm-up."""
    runs = found["ways_out_events"]
    hit = runs.filter(pl.col("first_step").is_not_null() & (pl.col("first_step") > WARMUP))
    return sorted(hit["seed"].to_list())[:EVENTS]


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
    rows = [["first step of the event", *(_step(events, seed) for seed in seeds), ""]]
    rows.append([f"twin at {TWIN_RATE:g}x", *map(_percent, twins), ""])
    lines = {"no action": [auc(events, seed, f"lr_mult={RATE:g}") for seed in seeds]}
    for label, way in WAYS.items():
        lines[label] = [auc(runs, seed, f"lr_mult={RATE:g}", f"mitigation={way}") for seed in seeds]
    for label, aucs in lines.items():
        below = [t - a for t, a in zip(twins, aucs, strict=True) if t is not None and a is not None]
        if any(a is not None for a in aucs):
            middle = f"{100 * statistics.median(below):.1f}" if below else "-"
            rows.append([label, *map(_percent, aucs), middle])
    header = [f"{data.auc} AUC, %", *(f"seed {seed}" for seed in seeds), "below the twin, median"]
    unhurt = events.filter(pl.col("first_step").is_null()).height
    text = f"{events.height} seeds at {RATE:g}x, {unhurt} of them undisturbed, {len(seeds)} treated here."
    return {"auc": as_markdown(header, rows), "events": text}


def _step(events: pl.DataFrame, seed: int) -> str:
    return f"{int(events.filter(pl.col('seed') == seed)['first_step'].item()):,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


WAYS_OUT = Study(
    name="ways_out",
    title="What each way out of a mid-run divergence is worth (Small, naive Adagrad, G_0 = 1e-6)",
    phases=(
        Phase("ways_out_events", lambda setting, _: event_jobs(setting)),
        Phase("ways_out", way_jobs),
    ),
    sections=sections,
)
