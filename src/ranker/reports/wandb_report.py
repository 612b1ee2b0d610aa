"""A report in W&B that compares the runs of a project or a sweep: made by code, so that every project has the same."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ranker.errors import UserError, install_hint
from ranker.runs.metric_names import PROGRESSIVE, TEST, TRAIN_LOSS, VAL
from ranker.runs.objective import direction

STEP = "trainer/global_step"
TABLE = ("status", "reason", "divergence/first_step", "lr", "seed", "commit", "config_hash")


def library() -> Any:
    """``wandb_workspaces.reports.v2``.

    Raises:
        UserError: it is not installed.
    """
    try:
        with warnings.catch_warnings():  # it is written for pydantic 1: nothing that this project could mend
            warnings.filterwarnings("ignore", message=".*Pydantic V1 style.*")
            warnings.filterwarnings("ignore", message=".*deprecated.*", module="pydantic.*")
            import wandb_workspaces.reports.v2 as reports
    except ModuleNotFoundError as error:
        raise UserError(f"a report in W&B needs wandb-workspaces: {install_hint('wandb')}") from error
    return reports


def report(project: str, metrics: Sequence[str], *, sweep: str | None = None, title: str = "") -> Any:
    """The report, not saved yet: who is lost, whether a healthy loss is worth anything, what is best, what differs.

    Runs are grouped as the trackers group them: each group is an optimizer at a rate, and its runs are the seeds.

    Args:
        project: ``entity/project``.
        metrics: such as ``click/auc``; the first one is that by which groups are compared.
        sweep: name of a sweep's folder: its runs alone.
        title: of the report.

    Returns:
        A ``Report`` of wandb-workspaces. Its ``save()`` needs W&B.

    Raises:
        UserError: the project has no entity, there is no metric, a metric has no direction, or the package is missing.
    """
    entity, _, name = project.partition("/")
    if not entity or not name or "/" in name:
        raise UserError(f"give entity/project, such as my-team/evenkeel; got '{project}'")
    if not metrics:
        raise UserError("give at least one metric, such as click/auc")
    for metric in metrics:
        direction(f"{TEST}/{metric}")
    wr = library()
    runs = wr.Runset(
        entity=entity,
        project=name,
        name=sweep or "all runs",
        filters=f"Tags in ['sweep:{sweep}']" if sweep else "",
        groupby=["group"],
    )
    completed = wr.Runset(
        entity=entity,
        project=name,
        name="completed runs",
        filters=" and ".join(
            ["SummaryMetric('status') = 'completed'", *([f"Tags in ['sweep:{sweep}']"] if sweep else [])]
        ),
        groupby=["group"],
    )
    first = metrics[0]
    return wr.Report(
        entity=entity,
        project=name,
        title=title or f"Evenkeel: {sweep or name}",
        description="Loss and metrics by optimizer and learning rate; mean and standard deviation over seeds.",
        width="fluid",
        blocks=[
            wr.H1("Who is lost, and when"),
            wr.PanelGrid(runsets=[runs], panels=_loss(wr, first)),
            wr.H1("Metrics while training"),
            wr.PanelGrid(runsets=[runs], panels=[_line(wr, f"{p}/{m}") for m in metrics for p in (VAL, PROGRESSIVE)]),
            wr.H1("The comparison"),
            wr.PanelGrid(runsets=[completed], panels=_comparison(wr, metrics)),
            wr.H1("What differs"),
            wr.PanelGrid(runsets=[_ungrouped(wr, runs)], panels=[wr.RunComparer(diff_only="split", layout=_wide(wr))]),
        ],
    )


def _line(wr: Any, metric: str, *, log: bool = False) -> Any:
    return wr.LinePlot(
        title=metric,
        x=STEP,
        y=[metric],
        log_y=log,
        title_x="step",
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=100,
    )


def _wide(wr: Any) -> Any:
    return wr.Layout(w=24, h=10)


def _loss(wr: Any, metric: str) -> list[Any]:
    diverged = wr.BarPlot(
        title="first step of a divergence", metrics=[wr.SummaryMetric("divergence/first_step")], orientation="h"
    )
    return [_line(wr, TRAIN_LOSS, log=True), _line(wr, f"{VAL}/{metric}"), diverged]


def _comparison(wr: Any, metrics: Sequence[str]) -> list[Any]:
    bars = [
        wr.BarPlot(title=f"{TEST}/{metric}", metrics=[wr.SummaryMetric(f"{TEST}/{metric}")], orientation="h")
        for metric in metrics
    ]
    against = wr.ScatterPlot(
        title=f"{metrics[0]} against the learning rate",
        x=wr.Config("lr_mult"),
        y=wr.SummaryMetric(f"{TEST}/{metrics[0]}"),
        log_x=True,
    )
    columns = [wr.Config("lr_mult"), wr.Config("optim.name"), wr.SummaryMetric(f"{TEST}/{metrics[0]}")]
    parallel = wr.ParallelCoordinatesPlot(
        title="a search", columns=[wr.ParallelCoordinatesPlotColumn(metric=column) for column in columns]
    )
    return [*bars, against, parallel]


def _ungrouped(wr: Any, runs: Any) -> Any:
    return wr.Runset(
        entity=runs.entity,
        project=runs.project,
        name="single runs",
        filters=runs.filters,
        pinned_columns=[f"summary:{name}" for name in TABLE],
    )
