"""Figures 1, 4 and 8: runs of naive Adagrad that recover or diverge, and the signals that move before the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ranker.paper.jobs import LABELS, RECORDED, WATCHED, Data, Job, Setting, grid
from ranker.paper.rendering import figure, save
from ranker.paper.store import curves
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown
from ranker.runs.metric_names import TRAIN_LOSS, VAL, sign, task_metric

# Candidates: naive Adagrad at multiples of 1x. At 1x it is lost in most seeds, below it in some.
RATES = (0.5, 1.0)
WIDEST = ("large_dcn",)  # without --models
SIGNS = {
    "grad_norm": "norm2(g)",
    "grad_over_weight": "norm2(g) / norm2(w)",
    "update_max": "infinity norm of r",
    "sigma_gc": "sigma GC would take",
    "sigma_agc": "sigma AGC would take",
    "sigma_clippy": "sigma Clippy would take",
}
KEYS = ("model", "lr_mult", "seed")
BEFORE = 10  # steps from moment a to moment b
AFTER = 50  # steps after b in which the highest loss, c, is searched


class Moments(NamedTuple):
    """The three steps that figure 4 marks.

    Attributes:
        a: still healthy, some steps before b.
        b: the first step of the divergence that the detector found.
        c: the highest loss soon after b.
    """

    a: int
    b: int
    c: int


def jobs(setting: Setting) -> list[Job]:
    """Candidate runs. Each figure takes the one that shows its subject best."""
    axes: dict[str, Sequence[object]] = {
        "model": setting.models_of(WIDEST if setting.models is None else tuple(LABELS)),
        "optim": ("adagrad",),
        "lr_mult": RATES[1:] if setting.quick else RATES,
        "seed": setting.seed_list,
    }
    return grid((*setting.common, *RECORDED, *WATCHED), axes)


def moments(first_step: int, curve: pl.DataFrame) -> Moments:
    """The three moments of a diverged run.

    Args:
        first_step: the first step of the divergence.
        curve: its curve, with columns step and loss.
    """
    after = curve.filter(pl.col("step").is_between(first_step, first_step + AFTER) & pl.col("loss").is_finite())
    lost = after.sort("loss", descending=True, maintain_order=True)["step"]
    return Moments(max(1, first_step - BEFORE), first_step, int(lost[0]) if len(lost) else first_step)


def read_losses(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:
    """Loss and hold-out AUC of one run that recovered and one that diverged; column ``kind`` tells which."""
    runs, missing = curves(folder, jobs, {"loss": TRAIN_LOSS, "auc": task_metric(VAL, setting.data.auc, "auc")})
    if runs.is_empty():
        return runs, missing
    found = {"micro": _recovered(runs), "full": _lost(runs)}
    parts = [_curve(runs, which, kind) for kind, which in found.items() if which is not None]
    return pl.concat(parts or [runs.clear()]), missing


def read_signs(
    setting: Setting, folder: Path, jobs: Sequence[Job], *, roles: Sequence[str]
) -> tuple[pl.DataFrame, list[Job]]:
    """Early signs of some layers of the diverged run, with its moments in column ``moment``.

    Columns: ``<role>/<sign>``.
    """
    names = {f"{role}/{name}": sign(role, name) for role in roles for name in SIGNS}
    columns = {"loss": TRAIN_LOSS, "auc": task_metric(VAL, setting.data.auc, "auc"), **names}
    runs, missing = curves(folder, jobs, columns)
    which = _lost(runs) if not runs.is_empty() else None
    if which is None:
        return runs.clear(), missing
    run = _curve(runs, which, "full")
    when = moments(_first(run), run)._asdict()
    names_of_steps = {step: name for name, step in when.items()}
    moment = pl.col("step").replace_strict(names_of_steps, default=None, return_dtype=pl.String)
    present = [name for name in run.columns if run[name].null_count() < run.height]
    return run.select(present).with_columns(moment.alias("moment")), missing


def loss_sections(data: Data, found: Found) -> Sections:  # noqa: ARG001
    """First, highest and last loss, and last AUC, of both runs."""
    rows = []
    for (kind,), run in found["fig1"].group_by("kind", maintain_order=True):
        losses, aucs = run["loss"].drop_nulls(), run["auc"].drop_nulls()
        peak = run.sort("loss", descending=True, nulls_last=True, maintain_order=True)
        cells = [f"{losses[0]:.3g}", f"{peak['loss'][0]:.3g} at step {peak['step'][0]}", f"{losses[-1]:.3g}"]
        rows.append([str(kind), _label(run), *cells, f"{100 * aucs[-1]:.2f}", str(run["status"][0])])
    return {"runs": as_markdown(["divergence", "run", "first loss", "highest", "last", "last AUC", "verdict"], rows)}


def draw_losses(data: Data, found: Found, destination: Path) -> None:
    """Loss above AUC; left the run that recovered, right the run that diverged."""
    picture, axes = figure(rows=2, columns=2, width=10, height=5, sharex="col", sharey="row")
    titles = {"micro": "micro: it comes back", "full": "full: it is lost"}
    for column, kind in enumerate(("micro", "full")):
        run = found["fig1"].filter(pl.col("kind") == kind)
        upper, lower = axes[0][column], axes[1][column]
        if run.is_empty():
            continue
        losses, aucs = run.drop_nulls("loss"), run.drop_nulls("auc")
        upper.plot(losses["step"], losses["loss"], color="#c0392b", linewidth=1.2)
        upper.set_yscale("log")
        upper.set_title(f"{titles[kind]}\n{_label(run)}", loc="left", fontsize=9)
        lower.plot(aucs["step"], aucs["auc"], color="#1a5276", marker="o", markersize=3, linewidth=1.2)
        lower.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        lower.set_xlabel("step")
    axes[0][0].set_ylabel("training loss")
    axes[1][0].set_ylabel(f"{data.auc} AUC, hold-out")
    save(picture, destination)


def sign_sections(name: str, data: Data, found: Found) -> Sections:  # noqa: ARG001
    """Every early sign at the three moments."""
    run = found[name]
    if run.is_empty():
        return {"moments": "No candidate was lost after its first step.\n"}
    at = {m: run.filter(pl.col("moment") == m) for m in ("a", "b", "c")}
    rows = [["training loss", *(_value(at[m], "loss") for m in at)]]
    for role in _roles(run):
        for key, label in SIGNS.items():
            rows.append([f"{role}: {label}", *(_value(at[m], f"{role}/{key}") for m in at)])
    steps = [f"{m}, step {at[m]['step'][0]}" if at[m].height else m for m in at]
    return {"run": _label(run) + "\n", "moments": as_markdown(["sign", *steps], rows)}


def draw_signs(name: str, data: Data, found: Found, destination: Path) -> None:  # noqa: ARG001
    """Loss, three early signs and three sigmas around the moments, one column per layer."""
    run = found[name]
    if run.is_empty():
        return
    when = {str(m): int(s) for m, s in run.drop_nulls("moment").select("moment", "step").iter_rows()}
    around = run.filter(pl.col("step").is_between(max(1, when.get("a", 1) - 10), when.get("c", run.height) + 15))
    roles = _roles(run)
    picture, axes = figure(
        rows=3, columns=len(roles), width=max(6.0, 3.6 * len(roles)), height=7, sharex=True, squeeze=False
    )
    for column, role in enumerate(roles):
        top, middle, bottom = (axes[row][column] for row in range(3))
        top.plot(around["step"], around["loss"], color="black", linewidth=1.2)
        top.set_title(f"{role}" if len(roles) > 1 else f"{_label(run)}: {role}", loc="left", fontsize=9)
        for key, label in list(SIGNS.items())[:3]:
            middle.plot(around["step"], around[f"{role}/{key}"], label=label, linewidth=1.2)
        for key, colour in (("sigma_gc", "#d68910"), ("sigma_agc", "#7d6608"), ("sigma_clippy", "#1a5276")):
            bottom.plot(around["step"], around[f"{role}/{key}"], label=SIGNS[key], color=colour, linewidth=1.2)
        for each in (top, middle, bottom):
            each.set_yscale("log")
            for moment, step in when.items():
                each.axvline(step, color="grey", linewidth=0.8, linestyle=":")
                if each is top:
                    each.annotate(f" {moment}", (step, 0.9), xycoords=("data", "axes fraction"), fontsize=9)
        bottom.set_xlabel("step")
    axes[0][0].set_ylabel("training loss")
    axes[1][-1].legend(frameon=False, fontsize=8)
    axes[2][-1].legend(frameon=False, fontsize=8)
    save(picture, destination)


def _value(run: pl.DataFrame, column: str) -> str:
    known = run[column].drop_nulls() if column in run.columns else pl.Series([], dtype=pl.Float64)
    return f"{known[0]:.3g}" if len(known) else "-"


def _label(run: pl.DataFrame) -> str:
    return f"{LABELS[run['model'][0]]}, naive Adagrad at {run['lr_mult'][0]:g}x, seed {run['seed'][0]}"


def _roles(run: pl.DataFrame) -> list[str]:
    return list(dict.fromkeys(name.rpartition("/")[0] for name in run.columns if name.endswith("/grad_norm")))


def _curve(runs: pl.DataFrame, which: dict[str, Any], kind: str) -> pl.DataFrame:
    chosen = runs.filter(*(pl.col(key).eq_missing(pl.lit(which[key])) for key in KEYS))
    return chosen.with_columns(pl.lit(kind).alias("kind"))


def _lost(runs: pl.DataFrame) -> dict[str, Any] | None:
    """The diverged run that stayed healthy longest."""
    lost = runs.filter(pl.col("status") == "diverged").unique(KEYS, maintain_order=True)
    lost = lost.with_columns(lost_at=pl.coalesce("full_step", "first_step"))
    return next(iter(lost.sort("lost_at", descending=True, maintain_order=True).to_dicts()), None)


def _first(run: pl.DataFrame) -> int:
    """The first step of the divergence that ended a run."""
    return int(run.select(pl.coalesce("full_step", "first_step"))[0, 0])


def _recovered(runs: pl.DataFrame) -> dict[str, Any] | None:
    """A completed run with a micro divergence, or else the completed run whose loss rose most.

    The detector does not report divergences in the first steps of a run.
    """
    completed = runs.filter(pl.col("status") == "completed").group_by(KEYS, maintain_order=True)
    rise = completed.agg(pl.col("micro").first(), (pl.col("loss").max() / pl.col("loss").first()).alias("rise"))
    return next(iter(rise.sort("micro", "rise", descending=True, maintain_order=True).to_dicts()), None)


FIG1 = Study(
    name="fig1",
    title="Figure 1, a micro and a full divergence of naive Adagrad",
    phases=(Phase("fig1", lambda setting, _: jobs(setting), read=read_losses),),
    sections=loss_sections,
    draw=draw_losses,
)


def _signs_study(name: str, title: str, roles: Callable[[Data], Sequence[str]]) -> Study:
    return Study(
        name=name,
        title=title,
        phases=(
            Phase(
                name,
                lambda setting, _: jobs(setting),
                read=lambda setting, folder, jobs: read_signs(setting, folder, jobs, roles=roles(setting.data)),
            ),
        ),
        sections=lambda data, found: sign_sections(name, data, found),
        draw=lambda data, found, destination: draw_signs(name, data, found, destination),
    )


FIG4 = _signs_study("fig4", "Figure 4, what moves before the loss does, top shared layer", lambda _: ("bottom_top",))
FIG8 = _signs_study(
    "fig8",
    "Figure 8, as figure 4 for the other layers",
    lambda data: ("dcn", "bottom_first", f"head/{data.auc}", f"head/{data.rmse}"),
)
