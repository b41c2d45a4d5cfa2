"""A chart of lines, as SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 600, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 34
_NUM_TICKS = 4


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

    Attributes:
        points: (step, value), at least one of them finite.
        colour: number of the run, from 0: one colour for each.
        style: "" or "faint" or "planned", of the page's style sheet.
    """

    points: Sequence[tuple[float, float]]
    colour: int = 0
    style: str = ""


@dataclass(frozen=True)
class _Axis:
    """Values from ``low`` to ``high`` along pixels from ``first`` to ``last``."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def line_chart(label: str, lines: Sequence[Line], *, from_zero: bool = False) -> str:
    """The chart; empty text where no line has a finite point.

    Args:
        label: what it shows, for who cannot see it.
        lines: over the same steps.
        from_zero: let the value axis begin at 0.
    """
    kept = [(line, [point for point in line.points if math.isfinite(point[1])]) for line in lines]
    points = [point for _, finite in kept for point in finite]
    if not points:
        return ""
    x_axis = _axis([x for x, _ in points], _LEFT, WIDTH - _RIGHT)
    values = [y for _, y in points] + ([0.0] if from_zero else [])
    y_axis = _axis(values, HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += [_y_tick(value, y_axis) for value in ticks(y_axis.low, y_axis.high)]
    parts += [_x_tick(value, x_axis) for value in ticks(x_axis.low, x_axis.high) if value == int(value)]
    parts += [_drawn(line, finite, x_axis, y_axis) for line, finite in kept if finite]
    return "".join([*parts, "</svg>"])


def _axis(values: Sequence[float], first: float, last: float) -> _Axis:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    return _Axis(low, high, first, last)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``_NUM_TICKS`` of them."""
    raw = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _y_tick(value: float, axis: _Axis) -> str:
    y = axis.at(value)
    line = f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'


def _x_tick(value: float, axis: _Axis) -> str:
    return f'<text x="{axis.at(value):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{value:.0f}</text>'


def _drawn(line: Line, points: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
    places = [f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points]
    kind = f"line run{line.colour} {line.style}".strip()
    if len(places) == 1:
        x, _, y = places[0].partition(",")
        return f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"/>'
    return f'<polyline class="{kind}" points="{" ".join(places)}"/>'
