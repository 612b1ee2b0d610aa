"""Parallel coordinates: one line a run through the settings that differ, ending at the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ranker.reports.comparison import caption, is_percent
from ranker.reports.sweep_page.groups import Panel, Run
from ranker.reports.sweep_page.learning import PANES
from ranker.reports.sweep_page.rates import Link, linked
from ranker.reports.web.frame import Scale, figure, number, svg_of
from ranker.runs.objective import LOWER_IS_BETTER

WIDTH, HEIGHT, TOP, BOTTOM, SIDE = 940, 300, 34, 14, 70
MOST_AXES = 9  # besides the metric; those of most values are kept
MOST_RUNS = 1500
CHOICES = ("model", "optim", "mitigation", "lr_mult")
LEVELS = 5  # shades, by the rank of the metric


@dataclass(frozen=True)
class _Axis:
    name: str
    words: tuple[str, ...]  # in order, for settings that are no numbers
    scale: Scale

    def place(self, value: object) -> float | None:
        """The height of a value; None where the run has none."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        return self.scale(self.words.index(str(value)) if self.words else float(str(value)))


def parallel(panels: Sequence[Panel], metric: str, table_settings: Sequence[str], link: Link) -> str:
    """The drawing; empty where fewer than two settings differ besides the metric, or no run has it.

    Args:
        panels: the runs.
        metric: such as ``click/auc``.
        table_settings: names of the columns with settings that differ. Without any, and with few learning rates, there
            is no drawing.
        link: where the page of a run is.
    """
    if not table_settings and all(len(panel.rates) <= PANES for panel in panels):
        return ""  # the charts against the learning rate show as much
    runs = [run for panel in panels for run in panel.runs if run.completed or run.lost]
    axes = _axes(runs, table_settings)
    values = sorted(run.value(metric) for run in runs if _is_good(run, metric))
    if len(axes) < 2 or len(values) < 2:
        return ""
    factor = 100.0 if is_percent(metric) else 1.0
    last = _Axis(caption(metric), (), Scale(factor * values[0], factor * values[-1], HEIGHT - BOTTOM, TOP))
    every = [*axes, last]
    across = [SIDE + i * (WIDTH - 2 * SIDE) / (len(every) - 1) for i in range(len(every))]
    drawn = runs[:MOST_RUNS]
    parts = [
        _line(run, metric, factor, values, every, across, link)
        for run in sorted(drawn, key=lambda r: not _is_good(r, metric))
    ]
    parts += [_axis(axis, x) for axis, x in zip(every, across, strict=True)]
    shades = [(text, f"p{level}") for level, text in ((0, "worst fifth"), (2, "middle"), (LEVELS - 1, "best fifth"))]
    lost = any(not _is_good(run, metric) for run in drawn)
    legend = [*shades, *([("lost, or no better than a constant", "plost")] if lost else [])]
    svg = svg_of("parallel", HEIGHT, f"settings and {metric}", "".join(parts), width=WIDTH)
    note = "A line is a run. Point at it to see its name and settings."
    if len(runs) > len(drawn):
        note += f" The first {len(drawn):,} of {len(runs):,} runs."
    return figure("settings that differ, and what came of them", svg, legend=legend, note=note, wide=True)


def settings_of(run: Run, names: Sequence[str]) -> str:
    """The settings of a run, in words."""
    found = [(name.split(".", 1)[-1], run.row.get(name)) for name in names]
    return ", ".join(f"{name} {value}" for name, value in found if value is not None)


def _axes(runs: Sequence[Run], settings: Sequence[str]) -> list[_Axis]:
    """The settings with several values; of too many, those with the most values."""
    seen = {
        name: {str(run.row[name]) for run in runs if run.row.get(name) is not None} for name in (*CHOICES, *settings)
    }
    several = [name for name, values in seen.items() if len(values) > 1]
    kept = sorted(several, key=lambda name: -len(seen[name]))[:MOST_AXES]
    return [_one_axis(name, seen[name]) for name in several if name in kept]


def _one_axis(name: str, seen: set[str]) -> _Axis:
    try:
        numbers = sorted(float(text) for text in seen)
    except ValueError:
        words = tuple(sorted(seen))
        return _Axis(name, words, Scale(0, len(words) - 1, HEIGHT - BOTTOM, TOP))
    log = numbers[0] > 0 and (numbers[-1] > 20 * numbers[0] or name == "lr_mult")
    return _Axis(name, (), Scale(numbers[0], numbers[-1], HEIGHT - BOTTOM, TOP, log=log))


def _line(
    run: Run, metric: str, factor: float, values: Sequence[float], axes: Sequence[_Axis], across: Sequence[float],
    link: Link,
) -> str:  # fmt: skip
    heights = [axis.place(run.row.get(axis.name)) for axis in axes[:-1]]
    value = run.value(metric)
    good = _is_good(run, metric)
    heights.append(axes[-1].place(factor * value) if good else HEIGHT - BOTTOM + 8.0)
    points = [f"{x:.0f},{y:.1f}" for x, y in zip(across, heights, strict=True) if y is not None]
    lower = metric.rsplit("/", 1)[-1] in LOWER_IS_BETTER
    worse = sum(other > value if lower else other < value for other in values) / len(values) if good else 0.0
    look = f"p{min(LEVELS - 1, int(LEVELS * worse))}" if good else "plost"
    settings = settings_of(run, [axis.name for axis in axes[:-1]])
    tip = f"{run.name}\n{settings}\n{number(factor * value) if good else _fate(run)}"
    path = f'<path class="run {look}" data-run="{escape(run.name)}" d="M{"L".join(points)}">'
    mark = f"{path}<title>{escape(tip)}</title></path>"
    return linked(mark, link(run))


def _fate(run: Run) -> str:
    return f"no better than a constant at {', '.join(run.useless)}" if run.useless else str(run.row["status"])


def _is_good(run: Run, metric: str) -> bool:
    return run.completed and metric.split("/")[0] not in run.useless and math.isfinite(run.value(metric))


def _axis(axis: _Axis, x: float) -> str:
    parts = [f'<line class="axis" x1="{x:.0f}" x2="{x:.0f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>']
    short = axis.name.split(".", 1)[-1]
    parts.append(f'<text class="name" x="{x:.0f}" y="14" text-anchor="middle">{escape(short)}</text>')
    marks = list(enumerate(axis.words)) if axis.words else [(v, number(v)) for v in _ends(axis.scale)]
    for value, text in marks:
        shown = text if len(text) < 16 else f"{text[:14]}…"
        parts.append(f'<text class="mark" x="{x + 5:.0f}" y="{axis.scale(value) + 4:.1f}">{escape(shown)}</text>')
    return "".join(parts)


def _ends(scale: Scale) -> list[float]:
    inner = [tick for tick in scale.ticks() if scale.low < tick < scale.high]
    far = [t for t in inner if min(abs(scale(t) - scale(scale.low)), abs(scale(t) - scale(scale.high))) > 18]
    return [scale.low, *(round(tick, 12) for tick in far), scale.high]
