"""What the start of a run is worth: naive Adagrad with one part of the regime's start taken away at a time."""

from __future__ import annotations

import polars as pl

from ranker.paper.jobs import LABELS, Data, Job, Setting, grid
from ranker.paper.rendering import cell, lost_at
from ranker.paper.store import matching
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown

RATES = (0.0625, 0.25)  # multiples of 1x, at which naive Adagrad trains well in the regime
MODELS = ("small", "large_dcn")
G_0, TABLES_G_0 = "optim.initial_accumulator_value", "optim.embedding.initial_accumulator_value"
STARTS: dict[str, Job] = {
    "the regime": (),
    "no warm-up": ("train.warmup_steps=0",),
    "heads start at 0": ("train.head_bias=zero",),
    "dense features normalised": ("data.dense_statistics=past_windows",),
    "G_0 = 0.1 in the layers": (f"{G_0}=0.1",),
    "G_0 = 0.1 in the embedding tables": (f"{TABLES_G_0}=0.1",),
    "G_0 = 0.1 in both, as in the paper": (f"{G_0}=0.1", f"{TABLES_G_0}=0.1"),
    "none of these": (
        "train.warmup_steps=0",
        "train.head_bias=zero",
        f"{G_0}=0.1",
        f"{TABLES_G_0}=0.1",
    ),
}
KEYS = ("model", "train.warmup_steps", "train.head_bias", "data.dense_statistics", G_0, TABLES_G_0)


def start_jobs(setting: Setting) -> list[Job]:
    """Each start at each rate, with several seeds."""
    return [
        job
        for model in setting.models_of(MODELS)
        for start in STARTS.values()
        for job in grid(
            (*setting.bare, f"model={model}", "optim=adagrad", *start), {"lr_mult": RATES, "seed": setting.seed_list}
        )
    ]


def start_sections(data: Data, found: Found) -> Sections:
    """One section per model: AUC, lost runs and the step of the loss, by start and rate."""
    made = {}
    for model in (m for m in LABELS if m in found["start"]["model"].unique()):
        rows = []
        for label, overrides in STARTS.items():
            mine = matching(found["start"], (f"model={model}", *overrides), KEYS)
            cells = [_cell(mine.filter(pl.col("lr_mult") == rate), data) for rate in RATES]
            rows.append([label, *cells])
        made[model] = as_markdown(
            [f"{LABELS[model]}, naive Adagrad, {data.auc} AUC", *(f"{rate:g}x" for rate in RATES)], rows
        )
    return made


def _cell(runs: pl.DataFrame, data: Data) -> str:
    step = lost_at(runs)
    return cell(runs, f"{data.auc}/auc") + (f", at step {step} (median)" if step else "")


START = Study(
    name="start",
    title="What the start of a run is worth",
    phases=(Phase("start", lambda setting, _: start_jobs(setting)),),
    sections=start_sections,
)
