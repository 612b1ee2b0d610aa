"""Line charts and heat maps as inline SVG. Colours are CSS classes, so that a drawing works in light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from ranker.reports.web.frame import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    axes,
    bottom_axis,
    figure,
    number,
    svg_of,
)
from ranker.reports.web.series import Series, thinned

BINS = 240
HEAT_COLUMNS = 120
HEAT_LEVELS = 16
HEAT_FLOOR = 1e-3


class Line(NamedTuple):
    """A series and its CSS class, ``s0`` to ``s8`` or ``faint``. ``dots`` marks each point of a sparse series."""

    label: str
    series: Series
    style: str
    dots: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    last_step: int,
    events: Sequence[Mapping[str, Any]] = (),
    log: bool | None = None,
    reference: tuple[float, str] | None = None,
    names: Sequence[str] = (),
    legend: bool = True,
) -> str:
    """A chart of lines over steps, with the run's events in the background.

    Args:
        title: what is drawn.
        lines: the series. Values that are not finite are drawn as marks at the upper edge.
        last_step: end of the step axis, the same for all charts of a page.
        events: lines of events.jsonl.
        log: whether the vertical axis is logarithmic; None decides from the data.
        reference: value and label of a horizontal line.
        names: of the places 0, 1, ... of the horizontal axis, such as days, in place of steps.
        legend: whether to name the lines below the chart.
    """
    y = _vertical(lines, log, reference)
    x = Scale(0, last_step, LEFT, WIDTH - RIGHT)
    ticks = list(enumerate(names)) if names else None
    parts = [axes(x, y, x_name="" if names else "step", x_ticks=ticks), _events(events, x)]
    parts += [_line(line, x, y) for line in lines]
    if reference is not None:
        at = y(reference[0])
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        above = at - 4 if at > TOP + 14 else at + 13
        place = f'x="{WIDTH - RIGHT - 3}" y="{above:.1f}" text-anchor="end"'
        parts.append(f'<text class="name halo" {place}>{escape(reference[1])}</text>')
    frame = f'data-x="{x.low},{x.high},{x.start},{x.stop}" data-y="{y.low},{y.high},{y.start},{y.stop},{int(y.log)}"'
    if names:
        frame += f' data-names="{escape("|".join(names))}"'
    svg = svg_of(
        "line", HEIGHT, title, "".join(parts) + f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>', frame
    )
    samples = [(line.label, line.style) for line in lines] if legend else []
    if any(not math.isfinite(value) for line in lines for value in line.series.values):
        samples.append(("NaN or infinity", "nonfinite"))
    return figure(title, svg, legend=samples)


def heat_map(
    title: str,
    rows: Mapping[str, Series],
    *,
    last_step: int,
    shade: Callable[[float], str] | None = None,
    names: Sequence[str] = (),
    events: Sequence[Mapping[str, Any]] = (),
    note: str = "",
) -> str:
    """A heat map with one row per series and one column per interval of steps.

    Args:
        title: what is drawn.
        rows: series by name, from top to bottom. A cell shows the smallest value of its interval.
        last_step: end of the step axis.
        shade: classes of a cell by its value, such as :func:`cosine`. Default: :func:`factor`.
        names: of the places 0, 1, ... of the horizontal axis, such as days, in place of steps.
        events: lines of events.jsonl.
        note: a text below the title.
    """
    tall, left = 15, 178
    width, height = 940, TOP + tall * len(rows) + BOTTOM
    x = Scale(0, last_step, left, width - RIGHT)
    parts = []
    for place, (name, series) in enumerate(rows.items()):
        top = TOP + tall * place
        shown = name if len(name) < 30 else "…" + name[-28:]
        parts.append(f'<text class="row" x="{left - 6}" y="{top + 11}" text-anchor="end">{escape(shown)}</text>')
        parts += _cells(series, x, top, tall - 1, last_step, shade or factor)
    bottom = height - BOTTOM
    # The cell of a name is as wide as the cells of its steps; the name stands below its middle.
    ticks = [((place + 0.5) * last_step / (last_step + 1), name) for place, name in enumerate(names)] if names else None
    parts.append(bottom_axis(x, bottom, name="" if names else "step", ticks=ticks))
    parts.append(_events(events, x, bottom=bottom))
    return figure(title, svg_of("heat", height, title, "".join(parts), width=width), note=note, wide=True)


def _vertical(lines: Sequence[Line], log: bool | None, reference: tuple[float, str] | None) -> Scale:
    finite = [v for line in lines for v in line.series.values if math.isfinite(v)]
    if reference is not None:
        finite.append(reference[0])
    positive = [v for v in finite if v > 0]
    if log is None:
        log = bool(positive) and len(positive) == len(finite) and max(positive) > 30 * min(positive)
    if log and positive:
        low, high = max(min(positive), max(positive) * 1e-12), max(positive)
        return Scale(low / 1.3, high * 1.3, HEIGHT - BOTTOM, TOP, log=True)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)


def _line(line: Line, x: Scale, y: Scale) -> str:
    """The line, interrupted at values that are not finite, with a mark at the upper edge instead."""
    pieces: list[list[str]] = [[]]
    marks, series = [], thinned(line.series, BINS)
    for step, value in zip(series.steps, series.values, strict=True):
        if math.isfinite(value):
            pieces[-1].append(f"{x(step):.1f},{y(value):.1f}")
        else:
            pieces.append([])
            at = x(step)
            marks.append(
                f'<path class="lost" d="M{at - 4:.1f},{TOP - 6}h8l-4,7z"><title>step {step}: {value}</title></path>'
            )
    drawn = [f"M{piece[0]}L{' '.join(piece)}" for piece in pieces if piece]
    curve = f'<path class="line {line.style}" data-label="{escape(line.label)}" d="{"".join(drawn)}"/>' if drawn else ""
    if line.dots:
        points = [point.split(",") for piece in pieces for point in piece]
        curve += "".join(f'<circle class="{line.style}" cx="{a}" cy="{b}" r="2.6"/>' for a, b in points)
    return curve + "".join(marks)


def _cells(series: Series, x: Scale, top: int, tall: int, last_step: int, shade: Callable[[float], str]) -> list[str]:
    lowest: dict[int, float] = {}
    for step, value in zip(series.steps, series.values, strict=True):
        column = min(HEAT_COLUMNS - 1, step * HEAT_COLUMNS // (last_step + 1))
        known = lowest.get(column, math.inf)
        lowest[column] = math.nan if math.isnan(value) or math.isnan(known) else min(known, value)
    cells, columns = [], sorted(lowest)
    for column, following in zip(columns, [*columns[1:], HEAT_COLUMNS], strict=True):
        value = lowest[column]
        start, stop = (x(c * (last_step + 1) / HEAT_COLUMNS) for c in (column, min(following, column + _gap(columns))))
        look = shade(value)
        cells.append(
            f'<rect class="{look}" x="{start:.1f}" y="{top}" width="{max(stop - start, 1):.1f}" height="{tall}">'
            f"<title>{number(value)}</title></rect>"
        )
    return cells


def _gap(columns: Sequence[int]) -> int:
    """Median distance of the columns with data. A cell extends to the next one, but at most this far."""
    gaps = sorted(b - a for a, b in pairwise(columns))
    return gaps[len(gaps) // 2] if gaps else HEAT_COLUMNS


def factor(value: float) -> str:
    """The look of a factor: no colour at 1 and above, full colour at ``HEAT_FLOOR``."""
    if not math.isfinite(value):
        return "unknown"
    strength = math.log(max(value, HEAT_FLOOR)) / math.log(HEAT_FLOOR) if value < 1 else 0.0
    return f"hot h{round(min(1.0, strength) * HEAT_LEVELS)}"


def cosine(value: float) -> str:
    """The look of a number from -1 to 1: both ends coloured."""
    if not math.isfinite(value):
        return "unknown"
    return f"{'minus' if value < 0 else 'plus'} h{round(min(1.0, abs(value)) * HEAT_LEVELS)}"


def _events(events: Sequence[Mapping[str, Any]], x: Scale, *, bottom: float = HEIGHT - BOTTOM) -> str:
    parts = []
    for event in events:
        kind, step = str(event.get("kind")), event.get("step")
        if not isinstance(step, int | float):
            continue
        start, tip = x(step), escape(f"{kind} at step {step:g}: {event.get('reason') or ''}")
        end = event.get("to_step") if kind == "rollback" else event.get("recovered_at")
        if isinstance(end, int | float):
            low, high = sorted((start, x(end)))
            band = f'x="{low:.1f}" y="{TOP}" width="{max(high - low, 1):.1f}" height="{bottom - TOP:.1f}"'
            parts.append(f'<rect class="event {escape(kind)}" {band}><title>{tip}</title></rect>')
        at = f'x1="{start:.1f}" x2="{start:.1f}" y1="{TOP}" y2="{bottom:.1f}"'
        parts.append(f'<line class="event {escape(kind)}" {at}><title>{tip}</title></line>')
    return "".join(parts)
