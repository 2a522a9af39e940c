"""Line charts as SVG: points with 95 % intervals, drawn without a script or a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 42
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")  # told apart without colours too


class Line(NamedTuple):
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def chart(
    lines: Sequence[Line], x_name: str, y_name: str, *, log: bool = False
) -> str:  # fmt: skip
    """The curves of a figure in one chart, with a legend below.  log: x in powers of two."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    every = [x for line in lines for x in line.x]
    ends = [v for line in lines for v in (*line.y, *line.low, *line.high) if math.isfinite(v)]
    axes = _Axes(min(every), max(every), min(0.0, *ends), _top(max(ends)), log)
    drawn = "".join(_line(line, axes, k) for k, line in enumerate(lines))
    label = f"{y_name} against {x_name}: " + "; ".join(line.name for line in lines)
    legend = "".join(
        f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><line class="c{k % 6}" x1="0" x2="28" '
        f'y1="4" y2="4" stroke-dasharray="{DASHES[k % 6]}"/></svg>{escape(line.name)}</li>'
        for k, line in enumerate(lines)
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{axes.drawn(x_name, y_name)}{drawn}</svg>"
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _top(value: float) -> float:
    return 1.0 if 0.5 < value <= 1.0 else value * 1.05 or 1.0


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
        return _ticks(self.first, self.last)

    def drawn(self, x_name: str, y_name: str) -> str:
        parts = []
        for value in _ticks(self.bottom, self.top):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                         f'y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                         f'text-anchor="end">{_number(value)}</text>')  # fmt: skip
        for value in self.x_ticks():
            parts.append(f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                         f'text-anchor="middle">{_number(value)}</text>')  # fmt: skip
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
    return f"{value:,.0f}" if abs(value) >= 10 or value == round(value) else f"{value:.3g}"


def _line(line: Line, axes: _Axes, k: int) -> str:
    points = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    whiskers = "".join(
        f'<line class="c{k % 6}" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(low):.1f}" '
        f'y2="{axes.y(high):.1f}"/>'
        for (x, _), low, high in zip(points, line.low, line.high, strict=False)
    )
    dots = "".join(
        f'<circle class="c{k % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
        f"<title>{escape(line.name)}: {_number(at)}, {value:.3g}</title></circle>"
        for (x, y), at, value in zip(points, line.x, line.y, strict=True)
    )
    return (f'<polyline class="c{k % 6}" points="{path}" stroke-dasharray="{DASHES[k % 6]}"/>'
            f"{whiskers}{dots}")  # fmt: skip
