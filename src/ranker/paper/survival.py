"""Time to divergence by method and learning rate: Kaplan-Meier curves, log-rank tests, medians.

The time of a run is the first step of the divergence that ended it. A run that completed is censored at its last step,
and a run whose training ended during a divergence (``unsettled``) is censored at the first step of that divergence.
All methods have the hyperparameters of ``conf/optim`` and the data set's own G_0, so that only the rule differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ranker.errors import UserError, install_hint
from ranker.paper.jobs import LABELS, METHODS, MORE_MODELS, PAPER_MODELS, Data, Job, Setting, grid
from ranker.paper.rendering import figure, save, spread
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown
from ranker.reports.curves import COLOURS

RATES = (1, 2, 4, 8)  # multiples of 1x
DEFAULT = ("small",)  # without --models
SEEDS = 10
MODELS = (*PAPER_MODELS, *MORE_MODELS)
WIDTHS = (1.6, 4.5, 3.0, 1.6, 1.2)  # of the lines of METHODS, so that one on another is seen
REFERENCES = ("adagrad", "gc")  # of the log-rank tests


class Times(NamedTuple):
    """Times of the runs of one method and rate.

    Attributes:
        steps: time of each run, in steps.
        lost: whether the run was lost then; False: it was censored.
    """

    steps: list[int]
    lost: list[bool]

    @property
    def losses(self) -> str:
        """How many were lost."""
        return f"{sum(self.lost)} of {len(self.lost)}"


def survival_jobs(setting: Setting) -> list[Job]:
    """Every method at every rate, with several seeds."""
    axes: dict[str, Sequence[object]] = {
        "model": setting.models_of(DEFAULT if setting.models is None else MODELS),
        "optim": METHODS[::4] if setting.quick else METHODS,
        "lr_mult": RATES[:1] if setting.quick else RATES,
        "seed": setting.seeds_or(SEEDS),
    }
    return grid(setting.bare, axes)


def times(runs: pl.DataFrame) -> Times:
    """The times of some runs.

    Args:
        runs: with columns status, steps, full_step, unsettled_step, first_step.

    Raises:
        ValueError: a run is lost, but no step is known.
    """
    steps, lost = [], []
    for run in runs.iter_rows(named=True):
        if run["status"] == "diverged":
            first = run["full_step"] if run["full_step"] is not None else run["first_step"]
            if first is None:
                raise ValueError(f"run {run['run']} diverged, but its events do not say at which step")
            steps.append(int(first))
        elif run["status"] == "unsettled":
            steps.append(int(run["unsettled_step"]))
        else:
            steps.append(int(run["steps"]))
        lost.append(run["status"] == "diverged")
    return Times(steps, lost)


def kaplan_meier(found: Times) -> Any:
    """The fitted estimator with a 95 % band (exponential Greenwood formula).

    Raises:
        UserError: lifelines is not installed.
    """
    lifelines = _lifelines()
    return lifelines.KaplanMeierFitter().fit(found.steps, found.lost)


def log_rank(one: Times, other: Times) -> float | None:
    """The p-value of the log-rank test; None where neither group lost a run, so that there is nothing to compare.

    Raises:
        UserError: lifelines is not installed.
    """
    _lifelines()
    from lifelines.statistics import logrank_test

    if not any((*one.lost, *other.lost)):
        return None
    return float(logrank_test(one.steps, other.steps, one.lost, other.lost).p_value)


def restricted_mean(found: Times, horizon: int) -> float:
    """Mean of min(time, horizon), in steps: the area below the curve up to the horizon.

    Raises:
        UserError: lifelines is not installed.
    """
    estimator = kaplan_meier(found)
    from lifelines.utils import restricted_mean_survival_time

    return float(restricted_mean_survival_time(estimator, t=horizon))


def survival_sections(data: Data, found: Found) -> Sections:
    """One section per model: lost runs, AUC of the others, median survival in rows, restricted mean, log-rank tests."""
    made = {}
    for model in _models(found["survival"]):
        runs = found["survival"].filter(pl.col("model") == model)
        batch, horizon = int(runs["batch_size"][0]), int(runs["steps"].max())  # type: ignore[arg-type]
        rows = []
        for rate in sorted(runs["lr_mult"].unique()):
            here = {m: _times(runs, m, rate) for m in METHODS}
            for method, mine in here.items():
                if not mine.steps:
                    continue
                median = kaplan_meier(mine).median_survival_time_
                reached = math.isfinite(median)
                mean = restricted_mean(mine, horizon)
                tests = [_p(mine, here[r]) if r != method else "" for r in REFERENCES]
                rows.append(
                    [
                        f"{rate:g}x",
                        method,
                        mine.losses,
                        _auc(runs, data, method, rate),
                        f"{median * batch:,.0f}" if reached else f"more than {horizon * batch:,}",
                        f"{mean * batch:,.0f}",
                        *tests,
                    ]
                )
        head = [
            "learning rate",
            "method",
            "lost",
            f"{data.auc} AUC of the others",
            "median survival, rows",
            f"mean up to {horizon * batch:,} rows",
        ]
        made[model] = as_markdown([*head, *(f"log-rank p against {r}" for r in REFERENCES)], rows)
    return made


def draw_survival(data: Data, found: Found, destination: Path) -> None:  # noqa: ARG001
    """One row of axes per model, at most two rates side by side; the curve of each method with its band."""
    runs = found["survival"]
    panels = [(model, rate) for model in _models(runs) for rate in sorted(runs["lr_mult"].unique())]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    picture, axes = figure(
        rows=rows, columns=columns, width=4.2 * columns, height=2.8 * rows, sharey=True, squeeze=False
    )
    for here in axes.flat[len(panels) :]:
        here.set_visible(False)
    for here, (model, rate) in zip(axes.flat, panels, strict=False):
        mine = runs.filter(pl.col("model") == model)
        curves = {method: _times(mine, method, rate) for method in METHODS}
        for width, (method, seen) in zip(WIDTHS, curves.items(), strict=True):
            if seen.steps:
                _draw(here, kaplan_meier(seen), COLOURS[method], method, width)
        lost = [f"{method} {sum(seen.lost)}/{len(seen.lost)}" for method, seen in curves.items() if any(seen.lost)]
        here.set_title(f"{LABELS[model]}, {rate:g}x. Lost: {', '.join(lost) or 'none'}", loc="left", fontsize=9)
        here.set_ylim(-0.02, 1.04)
        batch = int(mine["batch_size"][0])
        here.set_xlabel(f"step of {batch} rows", fontsize=8)
        here.set_ylabel("share of runs not lost", fontsize=8)
    lines = {line.get_label(): line for here in axes.flat for line in here.get_lines()}
    picture.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False
    )
    save(picture, destination)


def _draw(axes: Any, estimator: Any, colour: str, label: str, width: float) -> None:
    curve, band = estimator.survival_function_, estimator.confidence_interval_
    low, high = (band.iloc[:, i].to_numpy() for i in (0, 1))
    steps = curve.index.to_numpy()
    axes.step(steps, curve.iloc[:, 0].to_numpy(), where="post", color=colour, label=label, linewidth=width)
    if (high > low).any():  # no band where no run was lost
        axes.fill_between(steps, low, high, step="post", color=colour, alpha=0.12, linewidth=0)


def _p(one: Times, other: Times) -> str:
    p = log_rank(one, other) if other.steps else None
    return "-" if p is None else f"{p:.2g}"


def _auc(runs: pl.DataFrame, data: Data, method: str, rate: float) -> str:
    here = runs.filter((pl.col("optim") == method) & (pl.col("lr_mult") == rate) & (pl.col("status") == "completed"))
    return spread(here[f"{data.auc}/auc"].to_list(), percent=True) or "-"


def _times(runs: pl.DataFrame, method: str, rate: float) -> Times:
    return times(runs.filter((pl.col("optim") == method) & (pl.col("lr_mult") == rate)))


def _models(runs: pl.DataFrame) -> list[str]:
    return [model for model in MODELS if model in runs["model"].unique()]


def _lifelines() -> Any:
    try:
        import lifelines
    except ImportError as error:
        raise UserError(f"survival curves need lifelines; {install_hint('report')}") from error
    return lifelines


SURVIVAL = Study(
    name="survival",
    title="How long runs survive, by method and learning rate",
    phases=(Phase("survival", lambda setting, _: survival_jobs(setting)),),
    sections=survival_sections,
    draw=draw_survival,
)
