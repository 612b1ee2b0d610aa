"""Figures 5 and 6: hold-out AUC during training by method and rate, and Clippy's sigma by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ranker.paper.jobs import LABELS, PAPER_MODELS, RECORDED, UNWATCHED, WATCHED, Data, Job, Setting, grid
from ranker.paper.rendering import figure, save
from ranker.paper.search import METHODS, SEARCHED
from ranker.paper.store import curves
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.paper.table2 import Choices, choices
from ranker.reports.comparison import as_markdown
from ranker.reports.curves import COLOURS
from ranker.runs.metric_names import TRAIN_LOSS, VAL, sign, task_metric

WIDEST = "large_dcn"
COMPARED = ("gc", SEARCHED)  # on every model
SMOOTH = 10  # steps in the running mean of figure 6


def auc_jobs(setting: Setting, chosen: Choices) -> list[Job]:
    """Every method on Large+DCN, and GC and Clippy on the other models, as chosen for table 2; one seed."""
    made = []
    for model in setting.models_of(PAPER_MODELS):
        for method in METHODS if model == WIDEST or setting.quick else COMPARED:
            if (model, method) in chosen:
                axes = {**chosen[model, method].axes(model, method), "seed": (0,)}
                made += grid((*setting.common, *RECORDED, *UNWATCHED), axes)
    return made


def sigma_jobs(setting: Setting) -> list[Job]:
    """Clippy at 2x on Large+DCN, with early signs at every step."""
    axes: dict[str, Sequence[object]] = {
        "model": PAPER_MODELS[:1] if setting.quick else (WIDEST,),
        "optim": ("clippy",),
        "lr_mult": (2,),
        "seed": (0,),
    }
    return grid((*setting.common, *RECORDED, *WATCHED), axes)


def auc_sections(data: Data, found: Found) -> Sections:  # noqa: ARG001
    """AUC after a quarter, half and all of training."""
    rows = []
    for (model, method, rate), run in _runs(found["fig5"]):
        points = run.drop_nulls("auc")
        last = int(points["step"].max())  # type: ignore[arg-type]
        cells = []
        for share in (0.25, 0.5, 1):
            before = points.filter(pl.col("step") <= share * last)
            cells.append(f"{100 * before['auc'][-1]:.2f}" if before.height else "-")
        rows.append([LABELS[model], METHODS[method].label, f"{rate:g}x", *cells, str(run["status"][0])])
    header = ["model", "method", "lr", "AUC at 1/4", "at 1/2", "at the end", "status"]
    return {"auc": as_markdown(header, rows)}


def draw_auc(data: Data, found: Found, destination: Path) -> None:
    """Left: all methods on the widest model. Right: Clippy against GC on every model."""
    picture, (left, right) = figure(columns=2, width=11, height=4.2, sharey=True)
    runs = _runs(found["fig5"])
    models = list(dict.fromkeys(model for (model, _, _), _ in runs))
    styles = dict(zip(PAPER_MODELS, (":", "--", "-"), strict=True))
    for (model, method, rate), run in runs:
        points = run.drop_nulls("auc")
        line = {"color": COLOURS[METHODS[method].optim], "linewidth": 1.4}
        if model == models[-1]:
            style = "-" if method != "clippy" else "--"
            left.plot(
                points["step"], points["auc"], label=f"{METHODS[method].label} {rate:g}x", linestyle=style, **line
            )
        if method in COMPARED:
            label = f"{LABELS[model]}, {METHODS[method].optim} {rate:g}x"
            right.plot(points["step"], points["auc"], label=label, linestyle=styles[model], **line)
    left.set_title(f"{LABELS[models[-1]]}, every method", loc="left", fontsize=10)
    right.set_title("Clippy (lambda_abs searched) and GC", loc="left", fontsize=10)
    left.set_ylabel(f"{data.auc} AUC on the hold-out")
    for axes in (left, right):
        axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel("step")
        # Below the axes, because the curves leave no free corner.
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    save(picture, destination)


def sigma_sections(data: Data, found: Found) -> Sections:  # noqa: ARG001
    """Median sigma of each layer, in the first quarter of training and after it."""
    curve = found["fig6"]
    last = int(curve["step"].max())  # type: ignore[arg-type]
    early, late = curve.filter(pl.col("step") <= last / 4), curve.filter(pl.col("step") > last / 4)
    rows = []
    for role in _roles(curve):
        clipped = (curve[role].drop_nulls() < 1).mean()
        medians = [float(part[role].median()) for part in (early, late)]  # type: ignore[arg-type]
        rows.append([role, *(f"{m:.2g}" for m in medians), f"{100 * float(clipped):.0f} %"])  # type: ignore[arg-type]
    return {
        "sigma": as_markdown(
            ["layer, from the input upward", "median sigma, first quarter", "after it", "steps clipped"], rows
        )
    }


def draw_sigma(data: Data, found: Found, destination: Path) -> None:  # noqa: ARG001
    """Running mean of log10 sigma by layer."""
    curve = found["fig6"]
    picture, axes = figure(width=7.5, height=4.2)
    for role in _roles(curve):
        shown = curve.select("step", pl.col(role).log10().rolling_mean(SMOOTH, min_samples=1)).drop_nulls()
        axes.plot(shown["step"], 10 ** shown[role], label=role, linewidth=1.3)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"sigma, running mean of {SMOOTH} steps")
    title = f"{LABELS[curve['model'][0]]}, Clippy at {curve['lr_mult'][0]:g}x: the smaller, the more is clipped"
    axes.set_title(title, loc="left", fontsize=10)
    # Below the axes, because the curves leave no free corner.
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    save(picture, destination)


def _runs(curve: pl.DataFrame) -> list[tuple[tuple[str, str, float], pl.DataFrame]]:
    keys = ["model", "method", "lr_mult"]
    return [((str(m), str(o), float(str(r))), run) for (m, o, r), run in curve.group_by(keys, maintain_order=True)]


def _roles(curve: pl.DataFrame) -> list[str]:
    shared = ("dcn", "bottom_first", "bottom_top")
    layers = [name for name in curve.columns if name in shared or name.startswith("head/")]
    return [name for name in layers if curve[name].drop_nulls().len()]  # Small has no cross layer


FIG5 = Study(
    name="fig5",
    title="Figure 5, hold-out AUC while training",
    phases=(
        Phase(
            "fig5",
            lambda setting, found: auc_jobs(setting, choices("table2", setting.data, found)),
            read=lambda setting, folder, jobs: curves(
                folder, jobs, {"loss": TRAIN_LOSS, "auc": task_metric(VAL, setting.data.auc, "auc")}, every=5
            ),
        ),
    ),
    sections=auc_sections,
    draw=draw_auc,
    needs=("table2",),
)


def _sigma_columns(data: Data) -> dict[str, str]:
    roles = ("dcn", "bottom_first", "bottom_top", f"head/{data.auc}", f"head/{data.rmse}")
    return {role: sign(role, "sigma") for role in roles}


FIG6 = Study(
    name="fig6",
    title="Figure 6, Clippy's sigma by layer",
    phases=(
        Phase(
            "fig6",
            lambda setting, _: sigma_jobs(setting),
            read=lambda setting, folder, jobs: curves(folder, jobs, _sigma_columns(setting.data)),
        ),
    ),
    sections=sigma_sections,
    draw=draw_sigma,
)
