"""The hold-out at the end of training: metrics with their confidence intervals, segments, and reliability diagrams."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ranker.reports.web.frame import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, axes, figure, number, svg_of
from ranker.runs.metric_names import COMMON, TEST, task_metric

CALIBRATION = "calibration"  # name of the tables that are reliability diagrams

Table = tuple[Sequence[str], list[list[str]]]


def metric_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Header and rows: the common metrics with a row per task, and the others with a row per metric."""
    metrics: Mapping[str, Any] = summary.get("metrics") or {}
    split = [name.split("/") for name in metrics if name.count("/") == 2]
    tasks = list(dict.fromkeys(task for _, task, _ in split))
    names = list(dict.fromkeys(metric for _, _, metric in split))
    common = [name for name in names if name in COMMON]
    others = [name for name in names if name not in COMMON]
    tables: list[Table] = []
    if common:
        rows = [[escape(task), *(_cell(summary, task, name) for name in common)] for task in tasks]
        tables.append((("task", *common), rows))
    if others:
        rows = [[escape(name), *(_cell(summary, task, name) for task in tasks)] for name in others]
        tables.append((("metric", *tasks), rows))
    return tables


def segment_tables(summary: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Titles, headers and rows of the tables of metrics, but for those that are drawn."""
    return [
        (f"{table['name']} of {table['task']}", (table["columns"], [[_value(x) for x in row] for row in table["rows"]]))
        for table in _tables(summary)
        if table["name"] != CALIBRATION
    ]


def reliability_diagrams(summary: Mapping[str, Any]) -> list[str]:
    """A figure for each task with buckets: mean label over mean prediction, a dot per bucket."""
    drawn = []
    for table in _tables(summary):
        points = [
            (rows, prediction, label)
            for rows, prediction, label in (row for row in table["rows"] if len(row) == 3)
            if all(isinstance(x, int | float) and math.isfinite(x) for x in (rows, prediction, label))
        ]
        if table["name"] == CALIBRATION and points:
            drawn.append(_diagram(str(table["task"]), points))
    return drawn


def interval_note(summary: Mapping[str, Any]) -> str:
    """What the intervals are; empty without any."""
    level = (summary.get("intervals") or {}).get("level")
    return f"In brackets: {100 * level:g} % confidence intervals, by a bootstrap over groups." if level else ""


def _diagram(task: str, points: Sequence[tuple[float, float, float]]) -> str:
    ends = [value for _, *pair in points for value in pair]
    low, high = min(ends), max(ends)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    x = Scale(low - room, high + room, LEFT, WIDTH - RIGHT)
    y = Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)
    ticks = [(x(tick), number(round(tick, 12))) for tick in x.ticks()]
    parts = [axes(x, y, x_name="", x_ticks=ticks)]
    corners = f'x1="{x(x.low):.1f}" y1="{y(x.low):.1f}" x2="{x(x.high):.1f}" y2="{y(x.high):.1f}"'
    parts.append(f'<line class="reference" {corners}/>')
    path = "L".join(f"{x(prediction):.1f},{y(label):.1f}" for _, prediction, label in points)
    parts.append(f'<path class="line s0" d="M{path}"/>')
    for rows, prediction, label in points:
        tip = f"{rows:,.0f} rows: predicted {number(prediction)}, observed {number(label)}"
        at = f'cx="{x(prediction):.1f}" cy="{y(label):.1f}" r="3.4"'
        parts.append(f'<circle class="s0" {at}><title>{escape(tip)}</title></circle>')
    title = f"Reliability of {task}: mean label over mean prediction"
    svg = svg_of("reliability", HEIGHT, title, "".join(parts))
    return figure(title, svg, note="A dot per bucket of equal weight. On the dashed line, predictions are right.")


def _tables(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(summary.get("tables") or [])


def _cell(summary: Mapping[str, Any], task: str, name: str) -> str:
    """A metric, and its interval in brackets."""
    key = task_metric(TEST, task, name)
    if key not in summary["metrics"]:
        return ""
    value = summary["metrics"][key]
    if value is None:
        return "undefined"
    if name in ("observed", "nonfinite"):
        return f"{value:,.0f}"
    ends = (summary.get("intervals") or {}).get(key)
    known = ends is not None and all(end is not None for end in ends)
    return f"{value:.4f}" + (
        f' <span class="interval">[{ends[0]:.4f}, {ends[1]:.4f}]</span>' if ends is not None and known else ""
    )


def _value(value: Any) -> str:
    if value is None:
        return "undefined"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
