"""What else moves divergence: batch size, window, and the ad-hoc mitigations, alone and with Clippy.

On Small, which naive Adagrad trains at a quarter of 1x and loses at 1x, so that a move can be seen either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from ranker.paper.jobs import BARE, Data, Job, Setting, grid
from ranker.paper.markdown import cell, table
from ranker.paper.store import matching
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.paper.table2_sections import LABELS

RATES: dict[str, tuple[float, ...]] = {"adagrad": (0.25, 0.5, 1), "clippy": (1,)}
BATCHES = (256, 1024, 4096)
WINDOWS = (1024, 4096, 16384, 65536, 262144)  # rows; one batch is strict time order, the last is more than a day
MITIGATIONS: dict[str, Job] = {
    "none": (),
    "warm-up, 20 steps": ("train.warmup_steps=20",),
    "warm-up, 100 steps": ("train.warmup_steps=100",),
    "activations clipped at 10": ("model.net.clip_activations=10",),
    "layer norm": ("model.net.layer_norm=true",),
    "widest window": ("data.window=262144",),
    "a quarter of the rate": ("lr_mult=0.25",),
}


def batch_jobs(setting: Setting) -> list[Job]:
    """The same rows in smaller and larger batches."""
    return _jobs(setting, "scale.batch_size", BATCHES)


def window_jobs(setting: Setting) -> list[Job]:
    """From strict time order to the log shuffled whole."""
    return _jobs(setting, "data.window", WINDOWS)


def mitigation_jobs(setting: Setting, *, models: tuple[str, ...] = ("small", "large_dcn")) -> list[Job]:
    """Each mitigation at 1x, with naive Adagrad and with Clippy."""
    jobs = []
    for model in models[:1] if setting.quick else models:
        for method in ("adagrad", "clippy"):
            for overrides in MITIGATIONS.values():
                rate = () if any(o.startswith("lr_mult=") for o in overrides) else ("lr_mult=1",)
                axes: dict[str, Sequence[object]] = {"model": (model,), "optim": (method,)}
                jobs += grid((*setting.common, *BARE, *rate, *overrides), {**axes, "seed": _seeds(setting)})
    return jobs


def _jobs(setting: Setting, key: str, values: tuple[int, ...]) -> list[Job]:
    jobs = []
    for method, rates in RATES.items():
        axes: dict[str, Sequence[object]] = {"model": ("small",), "optim": (method,), "lr_mult": rates}
        axes[key] = values[::2] if setting.quick else values
        jobs += grid((*setting.common, *BARE), {**axes, "seed": _seeds(setting)})
    return jobs


def _seeds(setting: Setting) -> tuple[int, ...]:
    return tuple(range(setting.seeds))


def _condition_sections(data: Data, runs: pl.DataFrame, key: str, label: str) -> Sections:
    rows = []
    for (value,), here in runs.sort(key).group_by(key, maintain_order=True):
        cells = []
        for method, rates in RATES.items():
            for rate in rates:
                mine = here.filter((pl.col("optim") == method) & (pl.col("lr_mult") == rate))
                cells.append(cell(mine, f"{data.auc}/auc"))
        rows.append([f"{value:,.0f}", *cells])
    names = [f"{method} {rate:g}x" for method, rates in RATES.items() for rate in rates]
    return {"auc": table([label, *names], rows)}


def _mitigation_sections(data: Data, found: Found) -> Sections:
    runs = found["mitigations"]
    keys = sorted({o.split("=")[0] for overrides in MITIGATIONS.values() for o in overrides} - {"lr_mult"})
    made = {}
    for model in (m for m in LABELS if m in runs["model"].unique()):
        rows = []
        for label, overrides in MITIGATIONS.items():
            rate = next((o for o in overrides if o.startswith("lr_mult=")), "lr_mult=1")
            chosen = (f"model={model}", *(o for o in overrides if not o.startswith("lr_mult=")), rate)
            mine = matching(runs, chosen, ("model", "lr_mult", *keys))
            cells = [cell(mine.filter(pl.col("optim") == m), f"{data.auc}/auc") for m in ("adagrad", "clippy")]
            if cells != ["-", "-"]:  # nothing was run yet
                rows.append([label, *cells])
        made[model] = table([f"{LABELS[model]}, {data.auc} AUC", "naive Adagrad", "Clippy"], rows)
    return made


BATCH = Study(
    name="batch",
    title="Whether divergence moves with the batch size (Small, the same rows)",
    phases=(Phase("batch", lambda setting, _: batch_jobs(setting)),),
    sections=lambda data, found: _condition_sections(data, found["batch"], "scale.batch_size", "rows a step"),
)
WINDOW = Study(
    name="window",
    title="Whether divergence moves with the width of the window (Small)",
    phases=(Phase("window", lambda setting, _: window_jobs(setting)),),
    sections=lambda data, found: _condition_sections(data, found["window"], "data.window", "rows in the window"),
)
MITIGATION = Study(
    name="mitigations",
    title="Ad-hoc mitigations, alone and with Clippy",
    phases=(Phase("mitigations", lambda setting, _: mitigation_jobs(setting)),),
    sections=_mitigation_sections,
)
