"""Learning curves of groups: the median over the seeds with a band from the smallest to the largest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

import polars as pl

from ranker.errors import UserError
from ranker.reports.comparison import caption, is_percent
from ranker.reports.sweep_page.groups import Group, Panel, Run
from ranker.reports.web.frame import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, axes, figure, svg_of
from ranker.runs.metric_names import TRAIN_LOSS, VAL
from ranker.runs.run_folder import METRICS, whole_lines

BINS = 120  # points of a curve at most; fewer where there are many groups
POINTS = 40_000  # of all curves of a page together, about 30 bytes each and three times with the band
FEWEST_BINS = 12
PANES = 8  # learning rates with a chart of their own; more share one
NAMED = 12  # groups that a legend names one by one
LOSS_ROOM = 20.0  # a loss above so many times the largest of the first losses is drawn at the upper edge


class Bin(NamedTuple):
    """The finite values of a run in an interval of steps."""

    mean: float
    low: float
    high: float
    step: float  # mean


Bins = Mapping[int, Bin]  # by number of the interval


@dataclass(frozen=True)
class Curve:
    """A group's curve of one metric.

    Attributes:
        group: the group.
        points: step, smallest, median and largest over the sound runs, by interval of steps.
        alone: runs that were lost or are no better than a constant, each with its own step and value by interval.
    """

    group: Group
    points: tuple[tuple[float, float, float, float], ...]
    alone: tuple[tuple[Run, tuple[tuple[float, float], ...]], ...]

    @property
    def values(self) -> list[float]:
        """All heights at which something is drawn."""
        sound = [value for point in self.points for value in point[1:]]
        return sound + [value for _, points in self.alone for _, value in points]

    @property
    def first(self) -> float:
        """The largest value at its begin."""
        return max([*(p[3] for p in self.points[:1]), *(points[0][1] for _, points in self.alone)])


def curve_names(metrics: Sequence[str]) -> list[str]:
    """Columns of metrics.csv to draw: the training loss, then the metrics on the hold-out during training."""
    return [TRAIN_LOSS, *(f"{VAL}/{metric}" for metric in metrics)]


def learning(
    panels: Sequence[Panel], names: Sequence[str], looks: Mapping[str, str], *, advance: Callable[[int], object] = int
) -> str:
    """The charts of all panels: one for each metric and learning rate.

    Args:
        panels: the runs. Those without a folder or without metrics.csv have no curve.
        names: columns of metrics.csv.
        looks: CSS classes by optimizer.
        advance: called with the number of runs read since the last call.

    Returns:
        HTML; empty where no run has a curve.
    """
    count = sum(len(panel.groups) for panel in panels)
    bins = max(FEWEST_BINS, min(BINS, POINTS // max(1, count * len(names))))
    parts = []
    for panel in panels:
        last = max((int(run.row["steps"] or 0) for run in panel.runs), default=0) or 1
        read = {run.name: _read(run, names, last, bins) for run in _counted(panel.runs, advance)}
        for name in names:
            curves = [_curve(group, name, read) for group in panel.groups]
            shown = [curve for curve in curves if curve.points or curve.alone]
            if shown:
                parts.append(f"<h3>{escape(_heading(panel, name, several=len(panels) > 1))}</h3>")
                parts.append(_charts(shown, name, last, looks))
    return "".join(parts)


def _counted(runs: Sequence[Run], advance: Callable[[int], object]) -> Iterator[Run]:
    for run in runs:
        yield run
        advance(1)


def _heading(panel: Panel, name: str, *, several: bool) -> str:
    metric = caption(name.removeprefix(f"{VAL}/"))
    what = "training loss, weighted sum of tasks" if name == TRAIN_LOSS else f"{metric} on the hold-out while training"
    return f"{panel.title}: {what}" if several else what


def _read(run: Run, names: Sequence[str], last: int, bins: int) -> dict[str, Bins]:
    """A run's curves in intervals. Only the columns that are drawn are read, so a wide file of a long run fits."""
    path = (run.folder or Path()) / METRICS
    if run.folder is None or not path.is_file():
        return {}
    text = whole_lines(path)
    header = text[: text.find(b"\n")].decode(errors="replace").strip().split(",")
    kept = [name for name in names if name in header]
    if "step" not in header or not kept:
        return {}
    try:
        table = pl.read_csv(text, columns=["step", *kept], infer_schema=False, truncate_ragged_lines=True)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:120]}") from error
    return {name: _binned(table.select("step", value=name), last, bins, percent=is_percent(name)) for name in kept}


def _binned(table: pl.DataFrame, last: int, bins: int, *, percent: bool) -> Bins:
    step, value = pl.col("step").cast(pl.Int64, strict=False), pl.col("value").cast(pl.Float64, strict=False)
    rows = table.select(step, value * 100 if percent else value)
    finite = rows.filter(pl.col("step").is_not_null() & pl.col("value").is_not_null() & pl.col("value").is_finite())
    place = (pl.col("step") * bins // (last + 1)).clip(0, bins - 1).alias("bin")
    seen = finite.group_by(place).agg(
        pl.col("value").mean(),
        pl.col("value").min().alias("low"),
        pl.col("value").max().alias("high"),
        pl.col("step").mean(),
    )
    return {int(row[0]): Bin(*map(float, row[1:])) for row in seen.sort("bin").iter_rows()}


def _curve(group: Group, name: str, read: Mapping[str, Mapping[str, Bins]]) -> Curve:
    runs = [(run, read[run.name][name]) for run in group.runs if name in read.get(run.name, {})]
    sound = [one for run, one in runs if not (run.lost or run.useless)]
    points = []
    for place in sorted({place for one in sound for place in one}):
        bins = [one[place] for one in sound if place in one]
        step, middle = (statistics.fmean(b.step for b in bins), statistics.median(b.mean for b in bins))
        points.append((step, min(b.low for b in bins), middle, max(b.high for b in bins)))
    # The largest value of an interval, so that no spike of a loss is averaged away.
    alone = [(run, tuple((b.step, b.high) for b in one.values())) for run, one in runs if run.lost or run.useless]
    return Curve(group, tuple(points), tuple((run, line) for run, line in alone if line))


def _charts(curves: Sequence[Curve], name: str, last: int, looks: Mapping[str, str]) -> str:
    y = _vertical(curves, loss=name == TRAIN_LOSS)
    rates = sorted({curve.group.lr_mult for curve in curves})
    panes = [[rate] for rate in rates] if len(rates) <= PANES else [rates]
    figures = []
    for pane in panes:
        mine = [curve for curve in curves if curve.group.lr_mult in pane]
        several = len(pane) > 1
        title = f"learning rate {pane[0]:g}x to {pane[-1]:g}x" if several else f"learning rate {pane[0]:g}x"
        figures.append(_chart(title, mine, last, y, looks, rate_in_names=several))
    return f'<div class="grid">{"".join(figures)}</div>'


def _chart(
    title: str, curves: Sequence[Curve], last: int, y: Scale, looks: Mapping[str, str], *, rate_in_names: bool
) -> str:
    x = Scale(0, last, LEFT, WIDTH - RIGHT)
    parts = [axes(x, y)]
    same: dict[str, int] = {}
    names, crowded = [], len(curves) > NAMED
    for curve in curves:
        nth = same[curve.group.optim] = same.get(curve.group.optim, -1) + 1
        look = f"{looks[curve.group.optim]} {'thin' if crowded else f'd{nth % 4}'}"
        label = curve.group.label + (f" {curve.group.lr_mult:g}x" if rate_in_names else "")
        names.append((label + _fate(curve.group), look))
        parts.append(_drawn(curve, label, look, x, y))
    if crowded:
        names = [(name, look) for name, look in looks.items() if any(c.group.optim == name for c in curves)]
    frame = f'data-x="{x.low},{x.high},{x.start},{x.stop}" data-y="{y.low},{y.high},{y.start},{y.stop},{int(y.log)}"'
    cursor = f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return figure(title, svg_of("line", HEIGHT, title, "".join(parts) + cursor, frame), legend=names)


def _fate(group: Group) -> str:
    lost = sum(run.lost for run in group.runs)
    return f", {lost} of {len(group.runs)} lost" if lost else ""


def _drawn(curve: Curve, label: str, look: str, x: Scale, y: Scale) -> str:
    parts = []
    if any(high > low for _, low, _, high in curve.points) and len(curve.group.runs) > 1:
        edge = [f"{x(step):.1f},{y(high):.1f}" for step, _, _, high in curve.points]
        edge += [f"{x(step):.1f},{y(low):.1f}" for step, low, _, _ in reversed(curve.points)]
        parts.append(f'<path class="band {look}" d="M{edge[0]}L{" ".join(edge[1:])}Z"/>')
    for run, points in curve.alone:
        line = [f"{x(step):.1f},{y(value):.1f}" for step, value in points]
        worth = f", no better than a constant at {', '.join(run.useless)}" if run.useless else ""
        tip = f"{run.name}: {run.row['status']} at step {points[-1][0]:,.0f}{worth}"
        path = f'<path class="alone {look}" data-run="{escape(run.name)}" d="M{line[0]}L{" ".join(line[1:] or line)}">'
        parts.append(f"{path}<title>{escape(tip)}</title></path>")
        if run.lost:
            parts.append(
                cross(x(points[-1][0]), y(points[-1][1]), look, f"{tip} at step {run.row['steps']:,}", run=run)
            )
    line = [f"{x(step):.1f},{y(middle):.1f}" for step, _, middle, _ in curve.points]
    if line:
        path = f"M{line[0]}L{' '.join(line[1:] or line)}"
        parts.append(f'<path class="line {look}" data-label="{escape(label)}" d="{path}"/>')
    return "".join(parts)


def cross(x: float, y: float, look: str, tip: str, *, run: Run) -> str:
    """The mark of a lost run."""
    path = f"M{x - 3.5:.1f},{y - 3.5:.1f}l7,7m0,-7l-7,7"
    return f'<path class="cross {look}" data-run="{escape(run.name)}" d="{path}"><title>{escape(tip)}</title></path>'


def _vertical(curves: Sequence[Curve], *, loss: bool) -> Scale:
    """The scale of a metric, the same for every learning rate of a panel."""
    values = [value for curve in curves for value in curve.values]
    low, high = min(values), max(values)
    if loss and low > 0:
        first = max(curve.first for curve in curves)
        high = min(high, LOSS_ROOM * first)
        if high > 8 * low:
            return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)


def note(any_seeds: bool) -> str:
    """How to read the charts, in words."""
    band = "A line is the median of a group's seeds, its band goes from the smallest to the largest. "
    return (
        f"{band if any_seeds else ''}Thin lines are runs by themselves: a cross marks the end of a run that diverged, "
        "and one without a cross is no better than a constant prediction."
    )
