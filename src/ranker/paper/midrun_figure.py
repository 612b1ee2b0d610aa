"""A model lost in mid-run: naive Adagrad beside Clippy at the same rate and seed; loss, AUC, and the step size left."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl

from ranker.paper.jobs import LABELS, RECORDED, UNWATCHED, Data, Job, Setting, grid
from ranker.paper.rendering import figure, save
from ranker.paper.store import CURVE_KEYS, DIGITS, find, row_of, warmup_of
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown
from ranker.reports.curves import COLOURS
from ranker.runs.metric_names import TRAIN_LOSS, VAL, sign, task_metric
from ranker.runs.run_folder import METRICS, whole_lines

RATES, SEEDS = (0.8, 1), 8  # of the naive runs; one of those that were lost is shown
LEFT = 100  # steps after the loss that a run must have to be preferred: enough to see whether it comes back
SPAN = 24  # steps that a step cut reaches back, by default (ranker.stability.step_cut.StepCut)
CUT = re.compile(sign("(.+)", "step_cut"))
NAMES = {"adagrad": "naive Adagrad", "clippy": "Clippy"}


def clippy_jobs(setting: Setting, naive: pl.DataFrame) -> list[Job]:
    """Clippy at the rate and with the seed of the naive run that was chosen."""
    if naive.is_empty():
        return []
    run = naive.row(0, named=True)
    axes: dict[str, Sequence[object]] = {key: (run[key],) for key in ("model", "lr_mult", "seed")}
    return grid((*setting.common, *RECORDED, *UNWATCHED), {"optim": ("clippy",), **axes})


def naive_jobs(setting: Setting) -> list[Job]:
    """Naive Adagrad near 1x; ``read_lost`` chooses the run that is shown."""
    axes: dict[str, Sequence[object]] = {
        "model": setting.models_of(("small",)),
        "optim": ("adagrad",),
        "lr_mult": RATES[-1:] if setting.quick else RATES,
        "seed": setting.seeds_or(SEEDS),
    }
    return grid((*setting.common, *RECORDED, *UNWATCHED), axes)


def read_lost(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:
    """The curve of one lost run; no rows, but the columns, where none was lost.

    Of the runs lost after the warm-up and with at least ``LEFT`` steps left, or else of all that were lost, the one
    whose AUC fell most.
    """
    found, missing = find(folder, jobs)
    runs = [(path, row_of(job, path, summary)) for job, (path, summary) in found]
    lost = [(path, row) for path, row in runs if row["status"] == "diverged" and row["full_step"] is not None]
    if not lost:
        return curve(*runs[0], setting.data).clear() if runs else pl.DataFrame(), missing
    in_mid_run = [(path, row) for path, row in lost if warmup_of(path) < row["full_step"] <= row["steps"] - LEFT]
    return max((curve(*run, setting.data) for run in in_mid_run or lost), key=_fall), missing


def read_clippy(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:
    """The curve of the run of Clippy."""
    found, missing = find(folder, jobs)
    parts = [curve(path, row_of(job, path, summary), setting.data) for job, (path, summary) in found]
    return parts[0] if parts else pl.DataFrame(), missing


def curve(folder: Path, row: dict[str, Any], data: Data) -> pl.DataFrame:
    """Loss, AUC and step size of a run, one row per step.

    Columns: ``CURVE_KEYS``, step, loss, auc, cut (median over the shared layers of sqrt(G_now / G_before), where before
    is ``SPAN`` steps ago), step_size (the product of 1 / cut over spans that do not overlap: what is left of the step
    size of the first step; only at the ends of spans).
    """
    metrics = pl.read_csv(whole_lines(folder / METRICS), infer_schema_length=None)
    columns = {"loss": TRAIN_LOSS, "auc": task_metric(VAL, data.auc, "auc")}
    wanted = [
        (pl.col(source) if source in metrics.columns else pl.lit(None)).cast(pl.Float64).alias(name)
        for name, source in columns.items()
    ]
    cuts = [pl.col(name).cast(pl.Float64).alias(f"cut {name}") for name in metrics.columns if CUT.fullmatch(name)]
    merged = metrics.select("step", *wanted, *cuts).group_by("step", maintain_order=True)
    steps = merged.agg(pl.all().drop_nulls().last()).sort("step")
    layers = [name for name in steps.columns if name.startswith("cut ")]
    medians = [_median(list(values)) for values in steps.select(layers).iter_rows()] if layers else [None] * len(steps)
    steps = steps.select("step", *columns).with_columns(pl.Series("cut", medians, dtype=pl.Float64))
    ends = steps.filter((pl.col("step") > 1) & (pl.col("step") % SPAN == 1)).drop_nulls("cut")
    left = list(accumulate((1 / cut for cut in ends["cut"]), lambda a, b: a * b))
    sizes = pl.DataFrame({"step": ends["step"], "step_size": pl.Series(left, dtype=pl.Float64)})
    keys = [pl.lit(row.get(key)).alias(key) for key in CURVE_KEYS]
    made = steps.join(sizes, on="step", how="left", maintain_order="left").select(*keys, pl.all())
    return made.with_columns(pl.col("loss", "auc", "cut", "step_size").round_sig_figs(DIGITS))


def midrun_sections(data: Data, found: Found) -> Sections:
    """Both runs just before the loss of the naive one, soon after it, and at the end."""
    naive = found["midrun_naive"]
    if naive.is_empty():
        return {"runs": "No candidate was lost after its first step.\n"}
    first = int(naive["full_step"][0])
    rows = []
    for run in (naive, found["midrun_clippy"]):
        if run.is_empty():
            continue
        around = run.filter(pl.col("step").is_between(first, first + SPAN))
        aucs = run.drop_nulls("auc")
        before = aucs.filter(pl.col("step") < first)["auc"]
        sizes = run.drop_nulls("step_size")
        past, after = (sizes.filter(test)["step_size"] for test in (_before(first), pl.col("step") > first + SPAN))
        rows.append(
            [
                NAMES[run["optim"][0]],
                f"{around.sort('loss', descending=True, nulls_last=True)['loss'][0]:.3g}",
                f"{100 * before[-1]:.2f}" if before.len() else "-",
                f"{100 * aucs['auc'][-1]:.2f}" if aucs.height else "-",
                f"{past[-1]:.3g}" if past.len() else "-",
                f"{after[0]:.3g}" if after.len() else "-",
                str(run["status"][0]),
            ]
        )
    head = ["run", f"highest loss, steps {first} to {first + SPAN}", f"{data.auc} AUC before", "at the end"]
    head += ["step size left before", "after", "status"]
    return {"runs": f"{_title(naive)}.\n\n{as_markdown(head, rows)}"}


def draw_midrun(data: Data, found: Found, destination: Path) -> None:
    """Loss above, AUC in the middle, step size below; both runs in one picture."""
    naive = found["midrun_naive"]
    if naive.is_empty():
        return
    picture, (top, middle, bottom) = figure(rows=3, width=7.5, height=7, sharex=True)
    for run in (naive, found["midrun_clippy"]):
        if run.is_empty():
            continue
        line = {"color": COLOURS[run["optim"][0]], "linewidth": 1.3, "label": NAMES[run["optim"][0]]}
        losses, aucs, sizes = (run.drop_nulls(name) for name in ("loss", "auc", "step_size"))
        top.plot(losses["step"], losses["loss"], **line)
        middle.plot(aucs["step"], aucs["auc"], marker="o", markersize=3, **line)
        bottom.plot(sizes["step"], sizes["step_size"], marker="o", markersize=2, **line)
    for axes in (top, middle, bottom):
        axes.axvline(int(naive["full_step"][0]), color="grey", linewidth=0.8, linestyle=":")
    top.set_yscale("log")
    bottom.set_yscale("log")
    top.set_title(_title(naive), loc="left", fontsize=10)
    top.set_ylabel("training loss")
    middle.set_ylabel(f"{data.auc} AUC, hold-out")
    middle.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    bottom.set_ylabel("step size left, 1 = first step")
    bottom.set_xlabel("step")
    top.legend(frameon=False, fontsize=8)
    save(picture, destination)


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None and not math.isnan(value))
    return known[len(known) // 2] if known else None


def _fall(run: pl.DataFrame) -> float:
    """How far the AUC is at the end below the last one before the loss; -inf where nothing was known before it."""
    aucs = run.drop_nulls("auc")
    before = aucs.filter(pl.col("step") < pl.col("full_step"))["auc"]
    return float(before[-1] - aucs["auc"][-1]) if before.len() else -math.inf


def _before(step: int) -> pl.Expr:
    return pl.col("step") <= step


def _title(naive: pl.DataFrame) -> str:
    run = naive.row(0, named=True)
    return f"{LABELS[run['model']]} at {run['lr_mult']:g}x, seed {run['seed']}: lost at step {run['full_step']}"


MIDRUN = Study(
    name="midrun",
    title="A model lost in mid-run, naive Adagrad beside Clippy",
    phases=(
        Phase("midrun_naive", lambda setting, _: naive_jobs(setting), read=read_lost),
        Phase("midrun_clippy", lambda setting, found: clippy_jobs(setting, found["midrun_naive"]), read=read_clippy),
    ),
    sections=midrun_sections,
    draw=draw_midrun,
)
