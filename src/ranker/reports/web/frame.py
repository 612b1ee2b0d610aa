"""What every chart has: scales, axes, the SVG element and the figure around it. Colours are CSS classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 26

Ticks = Sequence[tuple[float, str]]  # place and text


@dataclass(frozen=True)
class Scale:
    """Maps numbers to pixels, linearly or logarithmically."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a number, clamped to the frame."""
        low, high, x = self.low, self.high, value
        if self.log:
            low, high, x = (math.log10(v) for v in (low, high, max(value, low)))
        share = (x - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """A few round numbers in the range."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first >= 1:
                every = max(1, (last - first + 3) // 4)
                return [10.0**e for e in range(first, last + 1, every)]
            # Fewer than two powers of ten: use round numbers as on a linear axis.
        rough = (self.high - self.low) / 4 or 1.0
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axes(x: Scale, y: Scale, *, x_name: str = "step", x_ticks: Ticks | None = None) -> str:
    """Both axes with their ticks.

    Args:
        x: the horizontal scale.
        y: the vertical one; its start is the lower edge.
        x_name: what the horizontal axis counts, written at its left end.
        x_ticks: places and texts of the horizontal ticks. Default: round numbers.
    """
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{x.start:g}" x2="{x.stop:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.start - 6:g}" y="{at + 4:.1f}" text-anchor="end">{number(round(tick, 12))}</text>')
    return "".join(parts) + bottom_axis(x, y.start, name=x_name, ticks=x_ticks)


def bottom_axis(x: Scale, bottom: float, *, name: str = "step", ticks: Ticks | None = None) -> str:
    """The horizontal axis. A tick that would run into the one before it has no text."""
    parts = [f'<line class="axis" x1="{x.start:g}" x2="{x.stop:g}" y1="{bottom:g}" y2="{bottom:g}"/>']
    last = x.start - 6 if name else -math.inf  # where the text before this one ends
    if name:
        parts.append(
            f'<text class="unit" x="{x.start - 6:g}" y="{bottom + 17:g}" text-anchor="end">{escape(name)}</text>'
        )
    for tick, text in ticks if ticks is not None else [(tick, f"{tick:,.12g}") for tick in x.ticks()]:
        at, half = x(tick), 3.3 * len(text)
        anchor = "end" if at > x.stop - half else "middle"
        left = at - (2 if anchor == "end" else 1) * half
        if left > last + 2:
            parts.append(f'<text x="{at:.1f}" y="{bottom + 17:g}" text-anchor="{anchor}">{escape(text)}</text>')
            last = left + 2 * half
    return "".join(parts)


def number(value: float) -> str:
    """A number in the short form of an axis label."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def svg_of(kind: str, height: float, title: str, body: str, extra: str = "", *, width: int = WIDTH) -> str:
    """The SVG element of a chart, of a kind that style and script know."""
    box = f'viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(title)}"'
    return f'<svg class="chart {kind}" data-chart="{kind}" {box} {extra}>{body}</svg>'


def figure(title: str, svg: str, *, legend: Sequence[tuple[str, str]] = (), note: str = "", wide: bool = False) -> str:
    """A chart with its title, a note below it and a legend of (text, classes of the sample)."""
    names = "".join(f'<span><i class="{style}"></i>{escape(label)}</span>' for label, style in legend)
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    legends = f'<p class="legend">{names}</p>' if names else ""
    head = f"<figure{' class=wide' if wide else ''}><figcaption>{escape(title)}</figcaption>{below}"
    return f'{head}<div class="scroll">{svg}</div>{legends}</figure>'
