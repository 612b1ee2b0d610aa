"""A metric of the hold-out against the learning rate, by optimizer, with the lost runs in lanes below."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ranker.reports.comparison import caption, is_percent
from ranker.reports.sweep_page.groups import Group, Panel, Run
from ranker.reports.web.frame import RIGHT, TOP, Scale, axes, figure, number, svg_of

WIDTH, PLOT, LEFT = 1010, 280, 64
LANE = 17  # height of the lane of an optimizer that lost runs
MOST_RUNS = 2000  # dots of a chart; of more runs, only the means and the lanes are drawn

Link = Callable[[Run], str]  # address of a run's page, empty where it has none


def against_rate(panel: Panel, metric: str, looks: Mapping[str, str], link: Link) -> str:
    """The chart of one panel; empty where no run has the metric and none was lost.

    Args:
        panel: the runs.
        metric: such as ``click/auc``.
        looks: CSS classes by optimizer.
        link: where the page of a run is.
    """
    factor = 100.0 if is_percent(metric) else 1.0
    task = metric.split("/")[0]
    completed = [run for run in panel.runs if run.completed and math.isfinite(run.value(metric))]
    # Useless runs would press the others into a line. They are drawn at the edge of the frame.
    sound = [run for run in completed if task not in run.useless] or completed
    values = [factor * run.value(metric) for run in sound]
    if not values and not any(run.lost for run in panel.runs):
        return ""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    y = Scale(low - room, high + room, TOP + PLOT, TOP)
    rates = panel.rates
    wide = rates[0] / 1.3, rates[-1] * 1.3
    x = Scale(*wide, LEFT, WIDTH - RIGHT, log=True)
    optims = [name for name in looks if any(group.optim == name for group in panel.groups)]
    lanes = [name for name in optims if any(g.optim == name and any(r.lost for r in g.runs) for g in panel.groups)]
    ticks = [(rate, f"{rate:g}x") for rate in rates]
    parts = [axes(x, y, x_name="lr", x_ticks=ticks)]
    for place, name in enumerate(optims):
        groups = [group for group in panel.groups if group.optim == name]
        shift = 5.0 * (place - (len(optims) - 1) / 2)  # so that methods do not hide one another
        parts.append(_means(groups, metric, factor, task, looks[name], x, y, shift))
        if len(panel.runs) <= MOST_RUNS:
            for group in groups:
                at = x(group.lr_mult) + shift
                parts += [_dot(r, metric, factor, task, at, y, looks[name], link) for r in group.runs if r.completed]
    for place, name in enumerate(lanes):
        top = TOP + PLOT + 34 + LANE * place
        parts.append(_lane([g for g in panel.groups if g.optim == name], name, looks[name], x, top, link))
    height = TOP + PLOT + 26 + (LANE * len(lanes) + 10 if lanes else 0)
    legend = [(name, looks[name]) for name in optims]
    useless = any(task in run.useless for run in panel.runs)
    words = [
        _unit(panel),
        "A dot is a run, a line joins the means of the seeds that completed.",
        "Hollow, in no mean, and at the edge where it lies outside: no better than a constant prediction."
        if useless
        else "",
        "Lanes below the axis: lost runs." if lanes else "",
    ]
    svg = svg_of("rates", height, f"{caption(metric)} against the learning rate", "".join(parts), width=WIDTH)
    title = f"{panel.title}: {caption(metric)} on the hold-out"
    return figure(title, svg, legend=legend, note=" ".join(filter(None, words)), wide=True)


def _unit(panel: Panel) -> str:
    """What 1x is, where it is the same for all runs."""
    bases = {
        round(float(run.row["lr"]) / run.row["lr_mult"], 9)
        for run in panel.runs
        if run.row.get("lr") and run.row["lr_mult"]
    }
    return f"1x is a learning rate of {number(bases.pop())}." if len(bases) == 1 else "1x differs between the runs."


def _means(
    groups: Sequence[Group], metric: str, factor: float, task: str, look: str, x: Scale, y: Scale, shift: float
) -> str:
    """A line for each setting of an optimizer, through the means at its learning rates."""
    parts = []
    for nth, settings in enumerate(dict.fromkeys(group.settings for group in groups)):
        points = []
        for group in groups:
            sound = [run for run in group.runs if run.completed and task not in run.useless]
            kept = [run.value(metric) for run in sound if math.isfinite(run.value(metric))]
            if group.settings == settings and kept:
                points.append(f"{x(group.lr_mult) + shift:.1f},{y(factor * statistics.fmean(kept)):.1f}")
        if len(points) > 1:
            label = escape(" ".join(filter(None, (groups[0].optim, settings))))
            path = f"M{points[0]}L{' '.join(points[1:])}"
            parts.append(f'<path class="line {look} d{nth % 4}" d="{path}"><title>{label}</title></path>')
    return "".join(parts)


def _dot(run: Run, metric: str, factor: float, task: str, at: float, y: Scale, look: str, link: Link) -> str:
    value = run.value(metric)
    if not math.isfinite(value):
        return ""
    hollow = task in run.useless
    tip = f"{run.name}: {number(factor * value)}" + (", no better than a constant" if hollow else "")
    kind = "hollow" if hollow else "dot"
    place = f'cx="{at:.1f}" cy="{y(factor * value):.1f}" r="3.4"'
    circle = f'<circle class="{kind} {look}" data-run="{escape(run.name)}" {place}>'
    mark = f"{circle}<title>{escape(tip)}</title></circle>"
    return linked(mark, link(run))


def _lane(groups: Sequence[Group], name: str, look: str, x: Scale, top: float, link: Link) -> str:
    """The lost runs of one optimizer: how many of how many at each learning rate."""
    hidden = look.split()[-1]
    parts = [f'<text class="lane {hidden}" x="{LEFT - 6}" y="{top + 12:g}" text-anchor="end">{escape(name)}</text>']
    parts.append(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top + LANE - 1:g}" y2="{top + LANE - 1:g}"/>'
    )
    for rate in sorted({group.lr_mult for group in groups}):
        runs = [run for group in groups if group.lr_mult == rate for run in group.runs]
        lost = [run for run in runs if run.lost]
        if not lost:
            continue
        steps = ", ".join(f"{run.name} ({run.row['status']})" for run in lost[:6])
        tip = f"{name} at {rate:g}x: {len(lost)} of {len(runs)} lost: {steps}{', ...' if len(lost) > 6 else ''}"
        path = f"M{x(rate) - 17:.1f},{top + 4:g}l7,7m0,-7l-7,7"
        words = f'<text class="count" x="{x(rate) - 6:.1f}" y="{top + 12:g}">{len(lost)} of {len(runs)}</text>'
        mark = f'<g class="{hidden}"><path class="cross {look}" d="{path}"/>{words}<title>{escape(tip)}</title></g>'
        parts.append(linked(mark, link(lost[0]) if len(lost) == 1 else ""))
    return "".join(parts)


def linked(mark: str, address: str) -> str:
    """A mark of a drawing that leads to a page; as it is without an address."""
    return f'<a href="{escape(address)}">{mark}</a>' if address else mark
