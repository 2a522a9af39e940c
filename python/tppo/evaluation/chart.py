"""Line charts as SVG: points with 95 % intervals, drawn without a script or a library.

Libraries were looked at: matplotlib is a heavy dependency whose SVG has fixed colours, Altair and
Plotly need a script in the page, pygal puts one in.  What is needed here is a page of code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 40
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")  # told apart without colours too
MOST_POINTS = 400  # of a curve; of a longer one evenly spaced rows are drawn
MOST_DOTS = 80  # more points than these are a line without dots


class Line(NamedTuple):
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    source: str = ""
    """The file of a run that its points stand in, with the names of x and y: `FILE#x,y`."""


def chart(
    lines: Sequence[Line],
    x_name: str,
    y_name: str,
    *,
    title: str = "",
    log: bool = False,
    y_ends: tuple[float, float] | None = None,
) -> str:
    """The curves of a figure in one chart, with a legend below; "" where none has a point.

    x_name, y_name: with units.  log: x in powers of two.  y_ends: the lowest and highest y; by
    default those of the points, and 0.
    """
    lines = [_thinned(line) for line in lines if len(line.x)]
    if not lines:
        return ""
    every = [x for line in lines for x in line.x]
    axes = _Axes(min(every), max(every), *(y_ends or _ends(lines)), log)
    drawn = "".join(_line(line, axes, k) for k, line in enumerate(lines))
    label = f"{y_name} against {x_name}: " + "; ".join(line.name for line in lines)
    legend = "".join(
        f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><line class="c{k % 6}" x1="0" x2="28" '
        f'y1="4" y2="4" stroke-dasharray="{DASHES[k % 6]}"/></svg>{escape(line.name)}</li>'
        for k, line in enumerate(lines)
    )
    heading = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    alone = title and len(lines) == 1  # its title says what it is
    ends = " ".join(repr(float(end)) for end in axes[:4])
    return (
        f'<figure>{heading}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}" data-ends="{ends}">'
        f"{axes.drawn(x_name, y_name)}{drawn}</svg>"
        + ("" if alone else f'<ul class="legend">{legend}</ul>') + "</figure>"
    )  # fmt: skip


def _thinned(line: Line) -> Line:
    n = len(line.x)
    if n <= MOST_POINTS:
        return line
    rows = sorted({round(k * (n - 1) / (MOST_POINTS - 1)) for k in range(MOST_POINTS)})
    x, y, low, high = ([column[i] for i in rows] if len(column) else [] for column in line[1:5])
    return Line(line.name, x, y, low, high, line.source)


def _ends(lines: Sequence[Line]) -> tuple[float, float]:
    """From the lowest to the highest point, 0 included, and shares to 1 where one is above 1/2."""
    ends = [v for line in lines for v in (*line.y, *line.low, *line.high) if math.isfinite(v)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    if low == 0 and 0.5 < high <= 1.0:
        return 0.0, 1.0
    margin = 0.05 * (high - low) or 1.0
    return low - (margin if low < 0 else 0.0), high + (margin if high > 0 or low == 0 else 0.0)


class _Axes(NamedTuple):
    """The scales of a chart."""

    first: float
    last: float
    bottom: float
    top: float
    log: bool

    def x(self, value: float) -> float:
        scale = math.log if self.log else float
        span = scale(self.last) - scale(self.first) or 1.0
        share = (scale(value) - scale(self.first)) / span
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)

    def x_ticks(self) -> list[float]:
        if self.log:
            n = math.floor(math.log2(self.last / self.first)) if self.last > self.first else 0
            return [self.first * 2**k for k in range(n + 1)]
        ticks = _ticks(self.first, self.last)
        whole = all(end == round(end) for end in (self.first, self.last)) and self.last > 1
        return [tick for tick in ticks if tick == round(tick)] if whole else ticks

    def drawn(self, x_name: str, y_name: str) -> str:
        parts = []
        for value in _ticks(self.bottom, self.top):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                         f'y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                         f'text-anchor="end">{_number(value)}</text>')  # fmt: skip
        for value in self.x_ticks():
            anchor = "end" if self.x(value) > WIDTH - 24 else "middle"
            parts.append(f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                         f'text-anchor="{anchor}">{_number(value)}</text>')  # fmt: skip
        middle = (HEIGHT - BOTTOM + TOP) / 2
        parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
                     f'{escape(x_name)}</text><text x="12" y="{middle}" text-anchor="middle" '
                     f'transform="rotate(-90 12 {middle})">{escape(y_name)}</text>')  # fmt: skip
        return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers from low to high."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / 5))
    step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    return f"{value:,.0f}" if abs(value) >= 10 or value == round(value) else f"{value:.3g}"


def _line(line: Line, axes: _Axes, k: int) -> str:
    points = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    whiskers = "".join(
        f'<line class="c{k % 6}" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(low):.1f}" '
        f'y2="{axes.y(high):.1f}"/>'
        for (x, _), low, high in zip(points, line.low, line.high, strict=False)
    )
    dots = "" if len(points) > MOST_DOTS else "".join(
        f'<circle class="c{k % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3" data-x="{at!r}" '
        f'data-y="{value!r}"><title>{escape(line.name)}: {_number(at)}, {value:.3g}</title>'
        "</circle>"
        for (x, y), at, value in zip(points, line.x, line.y, strict=True)
    )  # fmt: skip
    source = f' data-source="{escape(line.source)}"' if line.source else ""
    return (f'<g{source}><polyline class="c{k % 6}" points="{path}" '
            f'stroke-dasharray="{DASHES[k % 6]}"/>{whiskers}{dots}</g>')  # fmt: skip
